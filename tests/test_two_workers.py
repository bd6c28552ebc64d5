"""Two workers and a server on one PostgreSQL database and one Redis queue."""

from __future__ import annotations

import base64
import copy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from sqlalchemy import select, update

from ml_backend.backend import Backend
from ml_backend.demo.label_studio_server import wait_until_healthy
from ml_backend.demo.shapes import ShapeImage, generate
from ml_backend.jobs.jobs import STALE_AFTER
from ml_backend.settings import load_settings
from ml_backend.store.tables import Job, ModelVersion, now
from tests.conftest import ROOT, RunningBackend, capture, wait_for
from tests.distributed import PostgreSQL


class Apart(RunningBackend):
    """A server alone, and workers beside it."""

    def start(self) -> None:
        """Starts the server as `ml-backend serve` does, but no worker."""
        config = str(ROOT / "config/gunicorn.conf.py")
        self._process = self._run(
            "gunicorn", "--config", config, "ml_backend.http.app:create_app()"
        )
        wait_until_healthy(self.url, self._process, self.log, within=120)

    def start_worker(self) -> subprocess.Popen[bytes]:
        """Starts one more worker."""
        return self._run("ml_backend.cli", "worker", "--checked")

    def _run(self, *module: str) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", *module],
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.log.parent,
            )


@pytest.fixture
def apart(postgresql: PostgreSQL, redis_url: str, tmp_path: Path) -> Iterator[Apart]:
    """A server whose database and queue are others' services."""
    postgresql.empty()
    backend = Apart(
        tmp_path,
        DATABASE_URL=postgresql.url,
        QUEUE_URL=redis_url,
        ML_BACKEND_PRESET="tests.quick:PRESET",
        ML_BACKEND_TRAIN_MIN="100",
        ML_BACKEND_AUTO_LABEL="false",
        PYTHONPATH=str(ROOT),
        TEST_HOLD=str(tmp_path / "hold"),
    )
    backend.start()
    yield backend
    backend.stop()


def _annotate(backend: RunningBackend, project: int, number: int, image: ShapeImage) -> None:
    body = copy.deepcopy(capture("POST_webhook_ANNOTATION_CREATED"))
    encoded = base64.b64encode(image.encoded()).decode()
    body["project"]["id"] = project
    body["annotation"] |= {"id": number, "task": number}
    body["task"] |= {"id": number, "data": {"image": f"data:image/png;base64,{encoded}"}}
    assert backend.post("/webhook", body).ok


def _trainings(worker: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return [
        child
        for child in psutil.Process(worker.pid).children(recursive=True)
        if "ml_backend.programs.train" in child.cmdline()
    ]


def test_each_job_is_done_once_and_what_a_killed_worker_had_is_done_by_the_other(
    apart: Apart,
) -> None:
    seen = Backend(load_settings(apart.settings))

    def jobs() -> list[Job]:
        with seen.database.reading() as session:
            return list(session.scalars(select(Job).order_by(Job.id)))

    images = generate(6, seed=31, width=96, height=72)
    for project in (1, 2):
        for number, image in enumerate(images, 1):
            _annotate(apart, project, number, image)
    hold = Path(apart.settings["TEST_HOLD"])
    hold.touch()
    workers = [apart.start_worker(), apart.start_worker()]
    try:
        for project in (1, 2):
            body = capture("POST_webhook_START_TRAINING")
            body["project"]["id"] = project
            assert apart.post("/webhook", body).json()["status"] == "queued"
        (having,) = wait_for(
            lambda: [worker for worker in workers if _trainings(worker)],
            within=60,
            what="a worker has a training",
        )
        (taken,) = [job.id for job in jobs() if job.state == "running"]
        # One training at a time on one machine: the other job waits.
        assert [job.state for job in jobs() if job.id != taken] == ["queued"]
        (process,) = _trainings(having)
        having.kill()
        having.wait(10)
        wait_for(lambda: not process.is_running(), within=60, what="its training ends with it")
        # As if half a minute had passed.
        with seen.database.session() as session:
            session.execute(
                update(Job).where(Job.id == taken).values(heartbeat_at=now() - 2 * STALE_AFTER)
            )
        hold.unlink()
        wait_for(
            lambda: {job.state for job in jobs()} == {"done"}, within=240, what="both are done"
        )
        assert {job.id: job.attempt for job in jobs()} == {
            job.id: 2 if job.id == taken else 1 for job in jobs()
        }
        assert len({job.project_id for job in jobs()}) == 2
        with seen.database.reading() as session:
            versions = session.scalars(select(ModelVersion)).all()
        assert {v.project_id: v.name for v in versions} == {
            job.project_id: job.version for job in jobs()
        }
        assert len(versions) == 2
    finally:
        hold.unlink(missing_ok=True)
        for worker in workers:
            worker.terminate()
            worker.wait(60)
        seen.database.close()
