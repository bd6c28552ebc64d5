"""`connect` and `doctor`: a project's connection, made and examined."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from ml_backend.cli.opening import open_backend
from ml_backend.cli.options import JsonOption
from ml_backend.cli.output import fail, out, print_json


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
    from ml_backend.label_studio.client import LabelStudioError
    from ml_backend.label_studio.label_config import LabelConfigError
    from ml_backend.projects.connect import connect as connect_project

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
    if as_json:
        print_json({"project": done.project, "version": done.version, "steps": done.steps})
        return
    for step in done.steps:
        out.print(f"[green]✓[/] {escape(step)}")
    out.print(f"Project {project} is connected. `ml-backend doctor -p {project}` checks it.")


def doctor(
    project: Annotated[
        int | None, typer.Option("--project", "-p", help="The project to look at.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Look at everything that must be right, and say what to do where it is not."""
    from ml_backend.doctor.doctor import Doctor

    backend = open_backend()
    settings = backend.settings
    marks = {"ok": "[green]✓[/]", "warning": "[yellow]![/]", "error": "[red]✗[/]"}
    findings = []
    doctor = Doctor(settings, backend.database, backend.artefacts, backend.label_studios)
    for finding in doctor.examine(project):
        findings.append(finding)
        if not as_json:
            out.print(
                f"{marks[finding.status]} {finding.what}: {escape(finding.detail)}",
                soft_wrap=True,
                highlight=False,
            )
            if finding.remedy:
                out.print(f"  → {escape(finding.remedy)}", soft_wrap=True, highlight=False)
    if as_json:
        print_json(
            [
                {"what": f.what, "status": f.status, "detail": f.detail, "remedy": f.remedy}
                for f in findings
            ]
        )
    if any(f.status == "error" for f in findings):
        raise typer.Exit(1)
