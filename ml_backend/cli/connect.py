"""`connect` and `doctor`: make and examine a project's connection."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from ml_backend.cli.opening import open_backend
from ml_backend.cli.options import JsonOption
from ml_backend.cli.output import fail, out, print_json
from ml_backend.store.states import Trigger

if TYPE_CHECKING:
    from ml_backend.backend import Backend
    from ml_backend.jobs.jobs import Asked


def connect(
    project: Annotated[int, typer.Option("--project", "-p", help="The project's id.")],
    url: Annotated[
        str | None,
        typer.Option(
            help="This backend's address as Label Studio reaches it; by default the one that the "
            "project was connected with, or else HOST and PORT."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Connect a project, or repair its connection. Doing it again changes nothing."""
    from ml_backend.label_studio.errors import LabelStudioError
    from ml_backend.label_studio.label_config import LabelConfigError
    from ml_backend.projects.connect import connect as connect_project
    from ml_backend.wording import told, words

    backend = open_backend()
    settings = backend.settings
    client = backend.label_studios.default()
    if client is None:
        raise fail(
            "connecting needs LABEL_STUDIO_URL and LABEL_STUDIO_API_KEY (Label Studio shows the "
            "token under Account & Settings)"
        )
    try:
        done = connect_project(client, project, url, settings, backend.database, backend.ingest)
    except (LabelStudioError, LabelConfigError) as error:
        raise fail(str(error)) from None
    asked = _consider_training(backend, done.row)
    if as_json:
        print_json(
            {
                "project": done.project,
                "version": done.version,
                "annotated_tasks": done.annotated,
                "steps": [words(step) for step in done.steps],
                "step_reasons": [step.as_dict() for step in done.steps],
                "training": {
                    "job": asked.job,
                    "state": asked.state,
                    **told("reason", asked.reason),
                }
                if asked is not None
                else None,
            }
        )
        return
    for step in done.steps:
        out.print(f"[green]✓[/] {escape(words(step))}")
    if asked is not None:
        out.print(f"[green]✓[/] training {asked.state}: {escape(words(asked.reason))}")
    out.print(f"Project {project} is connected. `ml-backend doctor -p {project}` checks it.")


def _consider_training(backend: Backend, project_id: int) -> Asked | None:
    """Asks for the training that is due by the policy; None where nothing has changed."""
    from ml_backend.store.tables import Project

    with backend.database.reading() as session:
        project = session.get_one(Project, project_id)
    if project.revision == project.trained_revision:
        return None
    return backend.requests.training(project_id, trigger=Trigger.COMMAND)


def doctor(
    project: Annotated[
        int | None, typer.Option("--project", "-p", help="The project to look at.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Look at everything that must be right, and say what to do where it is not."""
    from ml_backend.doctor.doctor import Doctor
    from ml_backend.wording import words
    from ml_backend.wording.doctor import remedy

    backend = open_backend()
    settings = backend.settings
    marks = {"ok": "[green]✓[/]", "warning": "[yellow]![/]", "error": "[red]✗[/]"}
    findings = []
    doctor = Doctor(settings, backend.database, backend.artefacts, backend.label_studios)
    for finding in doctor.examine(project):
        findings.append(finding)
        if not as_json:
            out.print(
                f"{marks[finding.status]} {finding.what}: {escape(words(finding.reason))}",
                soft_wrap=True,
                highlight=False,
            )
            if to_do := remedy(finding.reason):
                out.print(f"  → {escape(to_do)}", soft_wrap=True, highlight=False)
    if as_json:
        print_json(
            [
                {
                    "what": f.what,
                    "status": f.status,
                    "detail": words(f.reason),
                    "remedy": remedy(f.reason),
                    "code": f.reason.code,
                    "values": dict(f.reason.values),
                }
                for f in findings
            ]
        )
    if any(f.status == "error" for f in findings):
        raise typer.Exit(1)
