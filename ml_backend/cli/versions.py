"""`versions`, `promote` and `rollback`: list model versions and choose the live one."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.markup import escape

from ml_backend.cli.opening import find_project, open_backend
from ml_backend.cli.options import JsonOption, ProjectOption
from ml_backend.cli.output import ap50_words, fail, out, print_json
from ml_backend.wording import told, words


def versions(project: ProjectOption, as_json: JsonOption = False) -> None:
    """List a project's model versions, newest first."""
    backend = open_backend()
    rows = backend.versions.all(find_project(backend, project).id)
    if as_json:
        print_json(
            [
                {
                    "version": v.name,
                    "state": v.state,
                    **told("reason", v.reason),
                    "card": _card(v.card),
                }
                for v in rows
            ]
        )
        return
    from rich.table import Column, Table

    table = Table(Column("version", overflow="fold"), "state", "tasks", "AP50", "reason")
    for v in rows:
        cells = (v.name, v.state, str(v.card["data"]["tasks"]), ap50_words(v.card), words(v.reason))
        table.add_row(*map(escape, cells))
    out.print(table)


def _card(card: dict[str, Any]) -> dict[str, Any]:
    """Adds words to a model card: the basis that its audits are measured against."""
    from ml_backend.wording.audits import with_words

    return {**card, "audits": with_words(card["audits"])} if "audits" in card else card


def promote(
    project: ProjectOption,
    version: Annotated[str, typer.Argument(help="The version.")],
    as_json: JsonOption = False,
) -> None:
    """Make a version live."""
    from ml_backend.store.artefacts import VersionMissing

    backend = open_backend()
    row = find_project(backend, project)
    try:
        backend.versions.promote(row.id, version)
    except VersionMissing as error:
        raise fail(str(error)) from None
    if as_json:
        print_json({"project": row.key, "live_version": version})
        return
    out.print(f"{escape(version)} is live")


def rollback(
    project: ProjectOption,
    to: Annotated[
        str | None, typer.Option(help="The version to go back to; the previous one by default.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Go back to an earlier version at once; what was live is not promoted again by itself."""
    from ml_backend.store.artefacts import VersionMissing

    backend = open_backend()
    row = find_project(backend, project)
    try:
        version = backend.versions.rollback(row.id, to)
    except VersionMissing as error:
        raise fail(str(error)) from None
    if as_json:
        print_json({"project": row.key, "live_version": version})
        return
    out.print(f"{escape(version)} is live again")
