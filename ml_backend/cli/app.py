"""Makes the application of all commands, and reports their failures."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import typer

from ml_backend.cli import connect, jobs, serve, simulate, status, versions
from ml_backend.cli.output import fail, say_wrong
from ml_backend.settings import SettingsError, load_settings

app = typer.Typer(
    help="Pre-annotates Label Studio's tasks and learns from what is annotated.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for command in (
    serve.serve,
    serve.worker,
    connect.connect,
    connect.doctor,
    jobs.train,
    jobs.autolabel,
    status.status,
    versions.versions,
    versions.promote,
    versions.rollback,
    simulate.simulate,
):
    app.command()(command)


def main() -> None:
    """Runs the command line; reports a failure in one line and exits with its status."""
    try:
        app()
    except SettingsError as error:
        say_wrong("setting", error)
        sys.exit(2)
    except Exception as error:
        words = _outer_cause(error)
        if words is None:
            raise
        logging.getLogger(__name__).debug("the command failed", exc_info=True)
        fail(words)
        sys.exit(1)


def _outer_cause(error: Exception) -> str | None:
    """Describes a failure outside this program, with its setting; None for a fault of ours."""
    from sqlalchemy.exc import DatabaseError

    from ml_backend.extensions import ExtensionError
    from ml_backend.label_studio.errors import LabelStudioError
    from ml_backend.store.database import is_outside

    if isinstance(error, LabelStudioError | ExtensionError):
        return str(error)
    settings = load_settings()
    if isinstance(error, DatabaseError) and is_outside(error):
        name = "DATABASE_URL" if settings.database_url else "MODEL_DIR"
        return f"{name}: the database cannot be used: {_in_one_line(error.orig)}"
    if isinstance(error, OSError):
        folder = settings.model_dir.absolute()
        below = error.filename and Path(str(error.filename)).absolute().is_relative_to(folder)
        return f"{'MODEL_DIR: ' if below else ''}{_in_one_line(error)}"
    return None


def _in_one_line(error: object) -> str:
    return " ".join(str(error).split())
