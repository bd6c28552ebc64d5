"""Run the demo: `python -m ml_backend.demo --label-studio PROGRAM`, or `make demo`."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import requests
import typer
from rich.console import Console
from rich.markup import escape

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

IMAGES = 150
ANNOTATED = 30
"""Images that are annotated from the start, so that a first training starts by itself."""

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
            "ML_BACKEND_TRAIN_BUDGET": "240",
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
                f"{ANNOTATED} of {IMAGES} images are annotated, so a first training starts in a "
                "few seconds and takes some\nminutes. After that, every task that you open has "
                "boxes. To see the progress:\n"
                f"  {escape(_environment(settings))} "
                f"{escape(str(Path(sys.executable).parent))}/ml-backend status\n"
                "Ctrl+C ends both.",
                highlight=False,
                soft_wrap=True,
            )
            while not exit_when_ready and backend.poll() is None and not stop.wait(0.5):
                pass


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
