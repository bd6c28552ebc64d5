"""Run a Label Studio that ends with this process."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

import requests

from ml_backend.machine import die_with_parent

_START_WITHIN = 300.0


class DidNotStart(RuntimeError):
    """A program did not start; the text names its log."""


@dataclass(frozen=True, slots=True)
class Login:
    """Hold the credentials of a user.

    Attributes:
        email: the user's name for logging in.
        password: the user's password.
        token: the user's legacy token, 40 hexadecimal digits.
    """

    email: str
    password: str
    token: str


class LabelStudioServer:
    """Run Label Studio while a context lasts.

    Both switches of Label Studio's guard against private addresses are off, because the backend
    on this machine has such an address.

    Args:
        executable: the program `label-studio`, from an environment of its own.
        folder: holds all data, and is kept for the next start.
        port: the port on 127.0.0.1 where it listens; a free one by default.
        login: the first user; random credentials by default.
        environment: more environment variables.
    """

    def __init__(
        self,
        executable: Path,
        folder: Path,
        *,
        port: int | None = None,
        login: Login | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._executable = executable
        self._folder = folder
        self._environment = dict(environment or {})
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.login = login or Login(
            "admin@example.com", secrets.token_urlsafe(12), secrets.token_hex(20)
        )

    def start(self) -> None:
        """Start Label Studio and wait until it answers; migrations make the first start slow.

        Raises:
            DidNotStart: Label Studio ended, or did not answer within five minutes.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        file = self._folder / "label-studio.log"
        self._log = file.open("ab")
        self._process = subprocess.Popen(
            [
                *(str(self._executable.absolute()), "start", "--no-browser", "-b"),
                *("--internal-host", "127.0.0.1", "--port", str(self.port)),
                *("--username", self.login.email, "--password", self.login.password),
                *("--user-token", self.login.token),
            ],
            env={
                **os.environ,
                "LABEL_STUDIO_BASE_DATA_DIR": str(self._folder.absolute()),
                "LABEL_STUDIO_ENABLE_LEGACY_API_TOKEN": "true",
                "COLLECT_ANALYTICS": "false",
                "LATEST_VERSION_CHECK": "false",
                "SENTRY_DSN": "",
                "FRONTEND_SENTRY_DSN": "",
                "ML_BLOCK_LOCAL_IP": "false",
                "SSRF_PROTECTION_ENABLED": "false",
                **self._environment,
            },
            stdout=self._log,
            stderr=subprocess.STDOUT,
            preexec_fn=die_with_parent,
        )
        wait_until_healthy(self.url, self._process, file, within=_START_WITHIN)

    def stop(self) -> None:
        """Send SIGTERM, and SIGKILL after ten seconds; wait for the end."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._log is not None:
            self._log.close()

    def __enter__(self) -> LabelStudioServer:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()


def free_port() -> int:
    """Return a port on 127.0.0.1 where nothing listens at the moment."""
    return free_ports(1)[0]


def free_ports(count: int) -> list[int]:
    """Return different ports on 127.0.0.1 where nothing listens at the moment."""
    # All stay bound until the last is found: a port that is free again may be found twice.
    with ExitStack() as bound:
        probes = [bound.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def wait_until_healthy(
    url: str, process: subprocess.Popen[bytes], log: Path, *, within: float
) -> None:
    """Wait until a server answers `/health`.

    Args:
        url: the server's address.
        process: the server; the wait is over when it ends.
        log: the file that an error names.
        within: seconds to wait.

    Raises:
        DidNotStart: the server ended, or did not answer in time.
    """
    until = time.monotonic() + within
    while time.monotonic() < until:
        if process.poll() is not None:
            raise DidNotStart(f"{url} ended with status {process.returncode}: see {log}")
        try:
            if requests.get(f"{url}/health", timeout=2).ok:
                return
        except requests.RequestException:
            # The server is not up yet.
            time.sleep(0.1)
    raise DidNotStart(f"{url} does not answer after {within:g} s: see {log}")
