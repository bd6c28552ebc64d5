"""Start PostgreSQL for the tests, with a folder and a port of its own.

The Debian package `postgresql` must be installed; where it is missing, the tests that need it are
skipped.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest

from ml_backend.demo.label_studio_server import DidNotStart, free_port
from ml_backend.machine import die_with_parent

_WITHIN = 60.0
# A time zone that is no whole number of hours from UTC shows where code relies on the server's.
_SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "timezone": "Asia/Kathmandu",
    "fsync": "off",
    "full_page_writes": "off",
}


class PostgreSQL:
    """A running PostgreSQL server.

    Attributes:
        port: the port on 127.0.0.1 where it listens.
        url: the address of its database, as `DATABASE_URL` takes it.
    """

    def __init__(self, port: int) -> None:
        self.port = port
        self.url = f"postgresql://tests@127.0.0.1:{port}/postgres"

    def connect(self) -> psycopg.Connection:
        """Connect to its database."""
        return psycopg.connect(self.url, autocommit=True)

    def empty(self) -> None:
        """Empty its database, after closing all other connections."""
        with self.connect() as connection:
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = 'postgres' AND pid <> pg_backend_pid()"
            )
            connection.execute("DROP SCHEMA IF EXISTS dbos CASCADE")
            connection.execute("DROP SCHEMA public CASCADE")
            connection.execute("CREATE SCHEMA public")


@contextmanager
def running_postgresql() -> Iterator[PostgreSQL]:
    """Run PostgreSQL while the context lasts; skip the test where it is not installed."""
    initdb = _program("initdb", "postgresql")
    server = PostgreSQL(free_port())
    # PostgreSQL refuses to run as root.
    account = pwd.getpwnam("postgres") if os.getuid() == 0 else pwd.getpwuid(os.getuid())
    with tempfile.TemporaryDirectory(prefix="postgresql-") as name:
        folder = Path(name)
        os.chown(folder, account.pw_uid, account.pw_gid)
        subprocess.run(
            [
                *(initdb, "--pgdata", folder / "data", "--username", "tests", "--auth", "trust"),
                *("--encoding", "UTF8", "--locale", "C", "--no-sync"),
            ],
            user=account.pw_uid,
            group=account.pw_gid,
            cwd=folder,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        settings = [f"--{key}={value}" for key, value in _SETTINGS.items()]
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                [
                    *(initdb.with_name("postgres"), "-D", folder / "data"),
                    *(f"--port={server.port}", *settings),
                ],
                user=account.pw_uid,
                group=account.pw_gid,
                cwd=folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=die_with_parent,
            )
        # SIGQUIT ends it at once: its data are not used again.
        with _ended(process, signal.SIGQUIT):
            _wait(process, folder / "log", lambda: server.connect().close())
            yield server


def _program(name: str, package: str) -> Path:
    """Return the path of a server's program, which Debian may keep outside `PATH`."""
    if found := shutil.which(name):
        return Path(found)
    versions = Path("/usr/lib/postgresql").glob(f"*/bin/{name}")
    newest = max(versions, key=lambda path: int(path.parts[4]), default=None)
    if newest is None:
        pytest.skip(f"there is no {name}: install the Debian package {package}")
    return newest


def _wait(process: subprocess.Popen[bytes], log: Path, ask: Callable[[], object]) -> None:
    until = time.monotonic() + _WITHIN
    while time.monotonic() < until and process.poll() is None:
        try:
            ask()
        except psycopg.OperationalError:
            # The server is not up yet.
            time.sleep(0.05)
        else:
            return
    raise DidNotStart(f"{process.args!r} did not start:\n{log.read_text(errors='replace')}")


@contextmanager
def _ended(process: subprocess.Popen[bytes], signum: signal.Signals) -> Iterator[None]:
    try:
        yield
    finally:
        process.send_signal(signum)
        process.wait(30)
