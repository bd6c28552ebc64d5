"""Finishes what a request for predictions left over, and imports it.

How far a job came is saved after each request to the model, as it is in auto-labelling, whose
process this runs in.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ml_backend.jobs.jobs import Jobs
from ml_backend.projects.clients import Clients
from ml_backend.serving.autolabel import (
    AT_ONCE,
    PATIENCE,
    AutoLabelFailed,
    Labelled,
    before_the_first,
    what_is_needed,
    why_not,
)
from ml_backend.settings import Settings
from ml_backend.store.database import Database
from ml_backend.store.tables import Job, Project

if TYPE_CHECKING:
    from ml_backend.serving.predictions import Serving


@dataclass(slots=True)
class _SoFar:
    """How far a job is, as its payload keeps it.

    Attributes:
        tasks: those that are left.
        done: tasks dealt with.
        imported: predictions imported.
        left_out: tasks without a prediction, because an image cannot be had.
        example: why the first of them was left out.
    """

    tasks: list[dict[str, Any]] = field(default_factory=list)
    done: int = 0
    imported: int = 0
    left_out: int = 0
    example: str = ""


class Leftovers:
    """Predicts for the tasks of a job and imports the predictions over the API.

    Args:
        settings: limits of images.
        database: which version is live.
        jobs: where progress is saved.
        label_studios: where predictions go.
        serving: predicts; called when there is something to predict.
        version_of: the version that a prediction made now would carry.
    """

    def __init__(
        self,
        settings: Settings,
        database: Database,
        jobs: Jobs,
        label_studios: Clients,
        serving: Callable[[], Serving],
        version_of: Callable[[Project], str],
    ) -> None:
        self._settings = settings
        self._database = database
        self._jobs = jobs
        self._label_studios = label_studios
        self._serving = serving
        self._version_of = version_of

    def run(self, job: Job) -> Labelled:
        """Does a claimed job, from where it was left.

        A task that holds a prediction of the version already is left out, so that a job that is
        tried again doubles nothing.

        Raises:
            AutoLabelRefused: there is no token, no label to detect, or no version.
            AutoLabelFailed: no image can be read.
            TakenOver: another run has the job.
            LabelStudioError: Label Studio could not do what was asked; what is imported stays.
        """
        so_far = _SoFar(**job.payload)
        total = so_far.done + len(so_far.tasks)
        version = ""
        while so_far.tasks:
            version = self._do_some(job, so_far)
            self._jobs.advance(
                job,
                so_far.done / total,
                f"{so_far.done:,} of {total:,} left-over tasks predicted",
                payload=dataclasses.asdict(so_far),
                version=version,
            )
        left_out = ""
        if so_far.left_out:
            left_out = f"; {so_far.left_out:,} left out, for example {so_far.example}"
        if so_far.left_out and not so_far.imported:
            raise AutoLabelFailed(f"no task could be predicted{left_out}")
        return Labelled(
            version or str(job.version),
            f"{so_far.imported:,} predictions imported for {total:,} left-over tasks{left_out}",
        )

    def _do_some(self, job: Job, so_far: _SoFar) -> str:
        """Does the next tasks with what is live now; answers the version."""
        with self._database.reading() as session:
            project = session.get_one(Project, job.project_id)
        client, config = what_is_needed(project, self._label_studios)
        if project.live_version is None:
            before_the_first(project, self._settings, self._version_of)
        tasks, left = so_far.tasks[:AT_ONCE], so_far.tasks[AT_ONCE:]
        predicted = self._serving().predict(
            project, config, tasks, deadline=time.monotonic() + PATIENCE
        )
        has = client.predicted_tasks(
            project.label_studio_id, predicted.version, [task["id"] for task in tasks]
        )
        predictions = []
        for task, result in zip(tasks, predicted.results, strict=True):
            if task["id"] in has:
                continue
            if result is not None:
                predictions.append({"task": task["id"], **result})
                continue
            so_far.left_out += 1
            so_far.example = so_far.example or why_not(
                project, config, task, self._settings, self._label_studios
            )
        self._jobs.hold(job)
        so_far.imported += client.import_predictions(project.label_studio_id, predictions)
        so_far.tasks = left
        so_far.done += len(tasks)
        return predicted.version
