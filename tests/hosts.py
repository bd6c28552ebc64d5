"""Run a server and workers on pretended hosts, which share a database and an artefact store.

`ML_BACKEND_HOST_NAME` names a host, and each host has a `MODEL_DIR` of its own. On a machine
without a GPU a host has one device, its CPU: a second worker of a host stands by.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
from sqlalchemy import select

from ml_backend.backend import Backend
from ml_backend.demo.label_studio_server import wait_until_healthy
from ml_backend.settings import load_settings
from ml_backend.store.tables import Job
from tests.conftest import ROOT, RunningBackend, wait_for

SERVER = "server"
"""The host of the server."""

Worker = subprocess.Popen[bytes]


class Hosts(RunningBackend):
    """A server, and workers on hosts of their own beside it.

    Args:
        folder: holds the log, and a `MODEL_DIR` for each host.
        settings: environment variables of all of them.
    """

    def __init__(self, folder: Path, **settings: str) -> None:
        super().__init__(folder, PYTHONPATH=str(ROOT), **settings)
        self.settings |= _settings_of(folder, SERVER)
        self._folder = folder
        self._workers: list[Worker] = []

    def start(self) -> None:
        """Start the server as `ml-backend serve` does, without a worker."""
        config = str(ROOT / "config/gunicorn.conf.py")
        self._process = self._run(
            SERVER, "gunicorn", "--config", config, "ml_backend.http.app:create_app()"
        )
        wait_until_healthy(self.url, self._process, self.log, within=120)

    def start_worker(self, host: str) -> Worker:
        """Start one more worker on a host."""
        self._workers.append(self._run(host, "ml_backend.cli", "worker"))
        return self._workers[-1]

    def wait_for_workers(self, working: int, standing_by: int = 0) -> None:
        """Wait until so many workers take jobs, and so many stand by.

        A worker checks its preset before, which builds a detector.
        """
        counts = {"takes jobs": working, "standing by": standing_by}
        wait_for(
            lambda: all(
                self.log.read_text(errors="replace").count(said) == count
                for said, count in counts.items()
            ),
            within=300,
            what=f"the workers are ready: {counts}",
        )

    def stop(self) -> None:
        """Send SIGTERM to all processes, and wait for their end."""
        for worker in self._workers:
            worker.terminate()
        for worker in self._workers:
            worker.wait(60)
        super().stop()

    def backend_of(self, host: str) -> Backend:
        """Make the parts of a backend as a program on a host makes them."""
        return Backend(load_settings(self.settings | _settings_of(self._folder, host)))

    def _run(self, host: str, *module: str) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", *module],
                env=self.environment | _settings_of(self._folder, host),
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self._folder,
            )


def job_processes(worker: Worker) -> list[psutil.Process]:
    """Return the processes that do jobs for a worker."""
    return [
        child
        for child in psutil.Process(worker.pid).children(recursive=True)
        if "ml_backend.programs.job" in child.cmdline()
    ]


def all_jobs(backend: Backend) -> list[Job]:
    """Read all jobs, oldest first."""
    with backend.database.reading() as session:
        return list(session.scalars(select(Job).order_by(Job.id)))


def _settings_of(folder: Path, host: str) -> dict[str, str]:
    return {"ML_BACKEND_HOST_NAME": host, "MODEL_DIR": str(folder / host)}
