"""`serve` and `worker`: the processes that run until they are stopped."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

import ml_backend
from ml_backend.cli.opening import check_device, open_settings
from ml_backend.cli.output import err, fail
from ml_backend.settings import Settings, SettingsError

if TYPE_CHECKING:
    from ml_backend.backend import Backend

_PORT_WITHIN = 5.0
"""Seconds in which a port that was in use may become free."""


def serve() -> None:
    """Serve, and work: the server and a worker together, until stopped."""
    from ml_backend.backend import Backend
    from ml_backend.worker.supervisor import die_with_parent

    settings = open_settings()
    settings.check_exposure()
    _greet(settings, check_device(settings))
    backend = Backend(settings)
    # Brings the schema up to date before two processes open the database.
    backend.database.close()
    _sweep_registry(backend)
    _check_port(settings)
    commands = {
        "server": [
            *(sys.executable, "-m", "gunicorn", "--config", str(_gunicorn_config())),
            "ml_backend.http.app:create_app()",
        ],
        "worker": [sys.executable, "-m", "ml_backend.cli", "worker", "--checked"],
    }
    # Both must use one folder, whatever folder they start in.
    environment = {**os.environ, "MODEL_DIR": str(settings.model_dir.absolute())}
    stopping = False

    def stop(signum: int, frame: object) -> None:
        nonlocal stopping
        stopping = True
        for process in running.values():
            process.terminate()

    def start(name: str) -> subprocess.Popen[bytes]:
        # If we are SIGKILLed, the kernel ends both children, which frees the port and the queue.
        return subprocess.Popen(commands[name], env=environment, preexec_fn=die_with_parent)

    running = {name: start(name) for name in commands}
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, stop)
    while not stopping:
        time.sleep(0.5)
        if stopping:
            # Both were told to end: neither is started again.
            break
        if (code := running["server"].poll()) is not None:
            running["worker"].terminate()
            running["worker"].wait()
            raise typer.Exit(code)
        if (code := running["worker"].poll()) is not None:
            err.print(f"the worker ended (status {code}); it is started again")
            time.sleep(1)
            if not stopping:
                running["worker"] = start("worker")
    for process in running.values():
        with suppress(subprocess.TimeoutExpired):
            process.wait(40)
        process.kill()


def worker(
    checked: Annotated[
        bool, typer.Option("--checked", hidden=True, help="`serve` has checked the settings.")
    ] = False,
) -> None:
    """Work: take jobs from the queue, start trainings when they are due."""
    from ml_backend.backend import Backend

    settings = open_settings()
    if not checked:
        # This imports torch, which a worker started by `serve` does without.
        check_device(settings)
    Backend(settings).worker().run()


def _gunicorn_config() -> Path:
    """Finds gunicorn's configuration: in the installed package, or in the repository."""
    package = Path(ml_backend.__file__).parent
    for folder in (package / "config", package.parent / "config"):
        if (folder / "gunicorn.conf.py").is_file():
            return folder / "gunicorn.conf.py"
    raise fail("gunicorn.conf.py is missing from the installation: install the package again")


def _check_port(settings: Settings) -> None:
    """Tries to bind the port.

    Raises:
        SettingsError: the port is in use, or the host is not an address of this machine.
    """
    where = settings.host, settings.port
    # The processes of a server that was killed a moment ago need a moment to end.
    until = time.monotonic() + _PORT_WITHIN
    while True:
        try:
            family, kind, _, _, address = socket.getaddrinfo(*where, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, kind) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
                return
        except OSError as error:
            if time.monotonic() > until:
                raise SettingsError(
                    f"HOST and PORT: {settings.host}:{settings.port} cannot be listened on: "
                    f"{error.strerror}; stop what does, or set another PORT"
                ) from error
        time.sleep(0.2)


def _sweep_registry(backend: Backend) -> None:
    """Removes what killed trainings left in the registry, unless a training runs right now."""
    from filelock import Timeout

    from ml_backend.worker.worker import turn

    # Another server on this MODEL_DIR may train: its unfinished artefact must stay.
    with suppress(Timeout), turn(backend.settings, "train"):
        backend.registry.sweep()


def _greet(settings: Settings, device: str) -> None:
    """Prints address and device, and which settings are missing."""
    err.print(f"ML backend on {escape(settings.own_url)}, {escape(device)}", highlight=False)
    if settings.label_studio_url is None or settings.label_studio_api_key is None:
        err.print(
            "[yellow]LABEL_STUDIO_URL or LABEL_STUDIO_API_KEY is not set:[/] uploaded images "
            "cannot be read, and `connect` cannot be used. Set both to begin.",
            soft_wrap=True,
        )
