"""Run the demo: `python -m ml_backend.demo --label-studio PROGRAM`, or `make demo`."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import requests
import typer
from rich.console import Console
from rich.markup import escape
from sqlalchemy import select

from ml_backend.backend import Backend
from ml_backend.demo.label_studio_server import (
    DidNotStart,
    LabelStudioServer,
    Login,
    free_ports,
    wait_until_healthy,
)
from ml_backend.demo.project import LABEL_CONFIG, annotate, create_project
from ml_backend.demo.shapes import generate
from ml_backend.machine import die_with_parent
from ml_backend.settings import load_settings
from ml_backend.store.states import JobKind, JobState
from ml_backend.store.tables import Job, Project
from ml_backend.wording import words

IMAGES = 150
ANNOTATED = 30
"""Images that are annotated from the start, so that a first training starts by itself."""
_LOOK = 1.0
"""Seconds between two looks for what has happened."""

_TOLD = {
    JobKind.LIVE_HEAD: "live head",
    JobKind.TRAIN: "training",
    JobKind.AUTOLABEL: "auto-labelling",
}

_out = Console(emoji=False)


def main(
    label_studio: Annotated[Path, typer.Option(help="The `label-studio` program.")],
    data: Annotated[Path, typer.Option(help="The folder for all data.")] = Path("demo-data"),
    exit_when_ready: Annotated[
        bool, typer.Option(help="Stop once the project is connected.")
    ] = False,
) -> None:
    """Start Label Studio and the backend; a second start goes on with the same project."""
    if not label_studio.is_file():
        _out.print(
            f"[red]there is no program {escape(str(label_studio))}:[/] `make demo` installs it"
        )
        raise typer.Exit(1)
    state = _read_or_make_state(data / "demo.json")
    stop = threading.Event()
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda *_: stop.set())
    _out.print("starting Label Studio (the first time takes a minute) …")
    login = Login("demo@example.com", state["password"], state["token"])
    with LabelStudioServer(
        label_studio, data / "label-studio", port=state["ports"][0], login=login
    ) as server:
        settings = {
            "LABEL_STUDIO_URL": server.url,
            "LABEL_STUDIO_API_KEY": login.token,
            "MODEL_DIR": str((data / "ml-backend").absolute()),
            "HOST": "127.0.0.1",
            "PORT": str(state["ports"][1]),
            "ML_BACKEND_TRAIN_BUDGET": "180",
            "ML_BACKEND_TRAIN_DELAY": "5",
        }
        _out.print("starting the ML backend …")
        with _backend(settings, data / "ml-backend.log") as backend:
            is_new = "project" not in state
            if is_new:
                _out.print(f"making a project of {IMAGES} images …")
                images = generate(IMAGES, seed=0)
                project, tasks = create_project(
                    server, "Shapes (demo)", LABEL_CONFIG, {i.name: i.encoded() for i in images}
                )
                state["project"] = project
                (data / "demo.json").write_text(json.dumps(state))
            _connect(state["project"], settings)
            if is_new:
                annotate(server, {tasks[i.name]: i for i in images[:ANNOTATED]})
            _out.print(
                f"\n[bold green]ready[/]  {server.url}/projects/{state['project']}/data\n"
                f"       user      {login.email}\n"
                f"       password  {login.password}\n\n"
                f"{ANNOTATED} of {IMAGES} images are annotated. A live head learns from them "
                "within seconds,\nand then every task that you open has boxes; a training follows, "
                "which takes some minutes.\nTo see the progress:\n"
                f"  {escape(_environment(settings))} "
                f"{escape(str(Path(sys.executable).parent))}/ml-backend status\n"
                "Ctrl+C ends both.",
                highlight=False,
                soft_wrap=True,
            )
            if exit_when_ready:
                return
            tell = _teller(settings, state["project"])
            while backend.poll() is None and not stop.wait(_LOOK):
                tell()


def _read_or_make_state(file: Path) -> dict[str, Any]:
    """Read the password, token, ports and project of an earlier start, or make new ones."""
    if file.is_file():
        return dict(json.loads(file.read_text()))
    file.parent.mkdir(parents=True, exist_ok=True)
    state = {
        "password": os.urandom(6).hex(),
        "token": os.urandom(20).hex(),
        "ports": free_ports(2),
    }
    file.write_text(json.dumps(state))
    file.chmod(0o600)
    return state


@contextlib.contextmanager
def _backend(settings: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run `ml-backend serve` while the context lasts."""
    with log.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "ml_backend.cli", "serve"],
            env={**os.environ, **settings},
            stdout=file,
            stderr=subprocess.STDOUT,
            preexec_fn=die_with_parent,
        )
        try:
            wait_until_healthy(
                f"http://{settings['HOST']}:{settings['PORT']}", process, log, within=120
            )
            yield process
        finally:
            process.terminate()
            process.wait(60)


def _teller(settings: dict[str, str], project: int) -> Callable[[], None]:
    """Return a function that prints what has happened since its last call."""
    backend = Backend(load_settings(settings))
    with backend.database.reading() as session:
        number = session.scalars(select(Project.id).where(Project.label_studio_id == project)).one()
    told: set[int] = set()

    def tell() -> None:
        ended = select(Job).where(
            Job.project_id == number,
            Job.kind.in_(_TOLD),
            Job.state.in_([JobState.DONE, JobState.REFUSED]),
        )
        with backend.database.reading() as session:
            jobs = session.scalars(ended.order_by(Job.id)).all()
        for job in jobs:
            if job.id not in told:
                told.add(job.id)
                line = f"{datetime.now():%H:%M:%S} {_TOLD[job.kind]}: {words(job.reason)}"
                _out.print(line, markup=False, highlight=False)

    return tell


def _connect(project: int, settings: dict[str, str]) -> None:
    subprocess.run(
        [sys.executable, "-m", "ml_backend.cli", "connect", "--project", str(project)],
        env={**os.environ, **settings},
        check=True,
    )


def _environment(settings: dict[str, str]) -> str:
    """Return the settings that a command needs, as words of a shell's command line."""
    return " ".join(
        f"{name}={settings[name]}"
        for name in ("LABEL_STUDIO_URL", "LABEL_STUDIO_API_KEY", "MODEL_DIR")
    )


if __name__ == "__main__":
    try:
        typer.run(main)
    except (DidNotStart, requests.RequestException, subprocess.CalledProcessError) as error:
        _out.print(f"[red]the demo did not start:[/] {escape(str(error))}")
        sys.exit(1)
