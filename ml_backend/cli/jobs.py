"""`train` and `autolabel`: ask for jobs."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from ml_backend.cli.opening import find_project, open_backend
from ml_backend.cli.options import JsonOption, ProjectOption
from ml_backend.cli.output import err, fail, out, print_json
from ml_backend.cli.progress import ProgressReporter
from ml_backend.store.states import ACTIVE, JobState, Trigger
from ml_backend.wording import told, words

if TYPE_CHECKING:
    from ml_backend.backend import Backend
    from ml_backend.reasons import Reason
    from ml_backend.store.tables import Job, Project

_TAKEN_WITHIN = 15.0
"""Seconds in which a worker takes a job, where one runs."""


def train(
    project: ProjectOption,
    wait: Annotated[bool, typer.Option(help="Wait for its end, showing progress.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Start a training at once."""
    backend = open_backend()
    row = find_project(backend, project)
    asked = backend.requests.training(
        row.id,
        trigger=Trigger.COMMAND,
        forced=True,
        is_read_back=_read_back(backend, row),
    )
    job = backend.jobs.get(asked.job)
    if wait and asked.state != JobState.REFUSED:
        job = _wait(backend, asked.job)
    assert job is not None
    _show(job, asked.reason if not wait else job.reason, as_json)


def autolabel(
    project: ProjectOption,
    wait: Annotated[bool, typer.Option(help="Wait for its end, showing progress.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Predict every task without an annotation; goes on by itself where it was interrupted."""
    backend = open_backend()
    row = find_project(backend, project)
    client = backend.label_studios.client(row)
    if client is None:
        raise fail(
            "predictions cannot be imported without LABEL_STUDIO_URL and LABEL_STUDIO_API_KEY "
            "(Label Studio shows the token under Account & Settings)"
        )
    # The job would wait for a failing Label Studio; this request shows the failure at once.
    client.project(row.label_studio_id)
    asked = backend.requests.autolabel(row.id, trigger=Trigger.COMMAND, forced=True)
    assert asked is not None
    job = _wait(backend, asked.job) if wait else backend.jobs.get(asked.job)
    assert job is not None
    _show(job, job.reason, as_json)


def _show(job: Job, reason: Reason, as_json: bool) -> None:
    """Prints state and reason of a job.

    Raises:
        typer.Exit: the job was refused, or has failed.
    """
    if as_json:
        print_json(job_as_dict(job))
    else:
        said = f"job {job.id}: {job.state}: {escape(words(reason))}"
        out.print(said, soft_wrap=True, highlight=False)
    if job.state in (JobState.REFUSED, JobState.FAILED):
        raise typer.Exit(1)


def _read_back(backend: Backend, project: Project) -> bool:
    """Reads back missed annotations; after a failure, prints it and answers False."""
    from ml_backend.label_studio.errors import LabelStudioError
    from ml_backend.projects.reconcile import reconcile

    client = backend.label_studios.client(project)
    if client is None:
        return False
    try:
        reconcile(project, client, backend.database, backend.ingest)
    except LabelStudioError as error:
        err.print(
            f"[yellow]not read back from Label Studio:[/] {escape(str(error))}",
            soft_wrap=True,
            highlight=False,
        )
        return False
    return True


def _wait(backend: Backend, job_id: int) -> Job:
    """Shows a job's progress until it has ended.

    Raises:
        typer.Exit: the user pressed Ctrl-C; the job goes on.
    """
    begun, warned = time.monotonic(), False
    try:
        with ProgressReporter(err) as progress:
            while True:
                job = backend.jobs.get(job_id)
                assert job is not None
                untaken = job.state == JobState.QUEUED and time.monotonic() > begun + _TAKEN_WITHIN
                if untaken and not warned:
                    warned = True
                    progress.message(
                        "no worker has taken it yet: does `ml-backend serve` or `ml-backend "
                        "worker` run on this MODEL_DIR?"
                    )
                progress.update(job.progress, words(job.reason)[:70])
                if job.state not in ACTIVE:
                    return job
                time.sleep(1)
    except KeyboardInterrupt:
        err.print(f"job {job_id} goes on without you: `ml-backend status` shows how far it is")
        raise typer.Exit(130) from None


def job_as_dict(job: Job) -> dict[str, Any]:
    """Describes a job as JSON holds it."""
    return {
        "job": job.id,
        "kind": job.kind,
        "state": job.state,
        **told("reason", job.reason),
        "progress": round(job.progress, 3),
        "trigger": job.trigger,
        "version": job.version,
    }
