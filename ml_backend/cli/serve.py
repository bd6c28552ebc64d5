"""`serve` and `worker`: run until they are stopped."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

import ml_backend
from ml_backend.cli.opening import check_device, open_settings
from ml_backend.cli.output import err, fail
from ml_backend.machine import die_with_parent
from ml_backend.settings import Settings, SettingsError

_PORT_WITHIN = 5.0
"""Seconds in which a port that was in use may become free."""

_ENDS_WITHIN = 40.0
"""Seconds that a process may take to end when it is told to."""


def serve() -> None:
    """Serve, and work: the server and a worker for each device together, until stopped."""
    from ml_backend.backend import Backend

    settings = open_settings()
    settings.check_exposure()
    _greet(settings, check_device(settings))
    # Brings the schema up to date before several processes open the database.
    Backend(settings).database.close()
    _check_port(settings)
    server = "server"
    commands = {
        server: [
            *(sys.executable, "-m", "gunicorn", "--config", str(_gunicorn_config())),
            "ml_backend.http.app:create_app()",
        ]
    } | {
        f"worker of {device}": [
            *(sys.executable, "-m", "ml_backend.cli", "worker", "--device", device)
        ]
        for device in _devices(settings)
    }
    # An absolute path, so that all processes use the same folder.
    environment = {**os.environ, "MODEL_DIR": str(settings.model_dir.absolute())}
    stopping = False

    def stop(signum: int, frame: object) -> None:
        nonlocal stopping
        stopping = True
        for process in running.values():
            process.terminate()

    def start(name: str) -> subprocess.Popen[bytes]:
        # If we are SIGKILLed, the kernel ends the children, which frees the port and the devices.
        return subprocess.Popen(commands[name], env=environment, preexec_fn=die_with_parent)

    running = {name: start(name) for name in commands}
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, stop)
    while not stopping:
        time.sleep(0.5)
        ended = {name: p.returncode for name, p in running.items() if p.poll() is not None}
        if stopping:
            # All processes were told to end: none is started again.
            break
        if server in ended:
            for process in running.values():
                process.terminate()
            _end(running.values())
            raise typer.Exit(ended[server])
        for name, code in ended.items():
            err.print(f"the {name} ended (status {code}); it is started again")
            time.sleep(1)
            if not stopping:
                running[name] = start(name)
                if stopping:
                    running[name].terminate()
    _end(running.values())


def _end(processes: Iterable[subprocess.Popen[bytes]]) -> None:
    """Waits for processes that were told to end, and kills those that do not."""
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(_ENDS_WITHIN)
        process.kill()
        process.wait()


def worker(
    device: Annotated[
        list[str] | None,
        typer.Option(hidden=True, help="A device of this host; `serve` has checked the settings."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", hidden=True, help="Only check the settings.")
    ] = False,
) -> None:
    """Work: take jobs from the queue, start trainings when they are due.

    A worker owns one device of its host; further workers take the others, or stand by.
    """
    from ml_backend.backend import Backend
    from ml_backend.worker.devices import devices_of_host

    settings = open_settings()
    if check:
        check_device(settings)
        return
    worker = Backend(settings).worker()
    if device is None:
        _check_in_own_process()
        try:
            device = devices_of_host(settings.device)
        except RuntimeError as error:
            raise fail(str(error)) from None
    worker.run(device)


def _check_in_own_process() -> None:
    """Runs `worker --check`: a worker that has not imported PyTorch takes a fifth of the memory.

    Raises:
        typer.Exit: a setting or an extension cannot be used; the process has said which.
    """
    done = subprocess.run(
        [sys.executable, "-m", "ml_backend.cli", "worker", "--check"], check=False
    )
    if done.returncode:
        raise typer.Exit(done.returncode)


def _devices(settings: Settings) -> list[str]:
    """Lists the devices of this host that the settings allow."""
    from ml_backend.serving.own_device import serving_devices

    return [str(device) for device in serving_devices(settings.device)]


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


def _greet(settings: Settings, device: str) -> None:
    """Prints address and device, and which settings are missing."""
    err.print(f"ML backend on {escape(settings.own_url)}, {escape(device)}", highlight=False)
    if settings.label_studio_url is None or settings.label_studio_api_key is None:
        err.print(
            "[yellow]LABEL_STUDIO_URL or LABEL_STUDIO_API_KEY is not set:[/] uploaded images "
            "cannot be read, and `connect` cannot be used. Set both to begin.",
            soft_wrap=True,
        )
