"""Several workers on several hosts, which share PostgreSQL and an artefact store.

The hosts are pretended: `ML_BACKEND_HOST_NAME` names them, and each has a `MODEL_DIR` of its own.
On a machine without a GPU a host has one device, its CPU: the second worker of a host stands by.
"""

from __future__ import annotations

import base64
import copy
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from sqlalchemy import select

from ml_backend.backend import Backend
from ml_backend.demo.label_studio_server import LabelStudioServer, wait_until_healthy
from ml_backend.demo.project import LABEL_CONFIG, create_project
from ml_backend.demo.shapes import SHAPES, ShapeImage, generate
from ml_backend.detection.detector import Detector
from ml_backend.detection.presets import preset_named
from ml_backend.label_studio.client import LabelStudioClient
from ml_backend.settings import load_settings
from ml_backend.store.states import JobKind, JobState
from ml_backend.store.tables import Job, ModelVersion
from tests.conftest import ROOT, RunningBackend, capture, make_live, predictions_held, wait_for
from tests.distributed import PostgreSQL


class Hosts(RunningBackend):
    """A server, and workers on hosts of their own beside it."""

    def start(self) -> None:
        """Starts the server as `ml-backend serve` does, but no worker."""
        config = str(ROOT / "config/gunicorn.conf.py")
        self._process = self._run(
            "server", "gunicorn", "--config", config, "ml_backend.http.app:create_app()"
        )
        wait_until_healthy(self.url, self._process, self.log, within=120)

    def start_worker(self, host: str) -> subprocess.Popen[bytes]:
        """Starts one more worker on a host."""
        return self._run(host, "ml_backend.cli", "worker")

    def backend_of(self, host: str) -> Backend:
        """The parts of a backend on a host, to look at."""
        return Backend(load_settings(self._settings_of(host)))

    def _settings_of(self, host: str) -> dict[str, str]:
        return {
            **self.settings,
            "ML_BACKEND_HOST_NAME": host,
            "MODEL_DIR": str(self.log.parent / host),
        }

    def _run(self, host: str, *module: str) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", *module],
                env={**self.environment, **self._settings_of(host)},
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.log.parent,
            )


@pytest.fixture
def hosts(postgresql: PostgreSQL, tmp_path: Path) -> Iterator[Callable[..., Hosts]]:
    """Makes a server whose database is a service of others'."""
    postgresql.empty()
    started: list[Hosts] = []

    def make(**settings: str) -> Hosts:
        backend = Hosts(
            tmp_path,
            DATABASE_URL=postgresql.url,
            ML_BACKEND_PRESET="tests.quick:PRESET",
            ML_BACKEND_TRAIN_MIN="100",
            PYTHONPATH=str(ROOT),
            **settings,
        )
        backend.start()
        started.append(backend)
        return backend

    yield make
    for backend in started:
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
        if "ml_backend.programs.job" in child.cmdline()
    ]


def _all_jobs(seen: Backend) -> list[Job]:
    with seen.database.reading() as session:
        return list(session.scalars(select(Job).order_by(Job.id)))


def test_trainings_three_workers_on_two_hosts_run_one_for_each_device_and_survive_a_kill(
    hosts: Callable[..., Hosts], tmp_path: Path
) -> None:
    hold = tmp_path / "hold"
    hold.touch()
    running = hosts(ML_BACKEND_AUTO_LABEL="false", TEST_HOLD=str(hold))
    seen = running.backend_of("server")
    images = generate(6, seed=31, width=96, height=72)
    for project in (1, 2, 3):
        for number, image in enumerate(images, 1):
            _annotate(running, project, number, image)
    on_a = running.start_worker("a")
    # Takes the device first.
    wait_for(lambda: (tmp_path / "a/locks/a-cpu.lock").exists(), within=60, what="a owns its CPU")
    workers = [on_a, running.start_worker("a"), running.start_worker("b")]
    try:
        for project in (1, 2, 3):
            body = capture("POST_webhook_START_TRAINING")
            body["project"]["id"] = project
            assert running.post("/webhook", body).json()["status"] == "queued"
        wait_for(
            lambda: (
                Counter(str(job.state) for job in _all_jobs(seen)) == {"running": 2, "queued": 1}
            ),
            within=60,
            what=f"two trainings run at once: {running.tail()}",
        )
        assert {job.host for job in _all_jobs(seen) if job.state == JobState.RUNNING} == {"a", "b"}
        wait_for(lambda: _trainings(on_a), within=60, what="the training's process on a runs")
        assert not _trainings(workers[1])
        (process,) = _trainings(on_a)
        (taken,) = [job.id for job in _all_jobs(seen) if job.host == "a"]
        on_a.kill()
        on_a.wait(10)
        wait_for(lambda: not process.is_running(), within=60, what="its training ends with it")
        # The other worker of the host takes over the device, and with it the training.
        wait_for(lambda: _trainings(workers[1]), within=60, what="the training starts again")
        hold.unlink()
        wait_for(
            lambda: {job.state for job in _all_jobs(seen)} == {JobState.DONE},
            within=240,
            what=f"all are done: {running.tail()}",
        )
        assert {job.id: job.attempt for job in _all_jobs(seen)} == {
            job.id: 2 if job.id == taken else 1 for job in _all_jobs(seen)
        }
        with seen.database.reading() as session:
            versions = session.scalars(select(ModelVersion)).all()
        assert {v.project_id: v.name for v in versions} == {
            job.project_id: job.version for job in _all_jobs(seen)
        }
        assert len(versions) == 3
    finally:
        hold.unlink(missing_ok=True)
        _stop(workers)
        seen.database.close()


def test_auto_labelling_large_project_is_shared_by_the_workers_of_two_hosts(
    hosts: Callable[..., Hosts], label_studio: LabelStudioServer
) -> None:
    images = {i.name: i.encoded() for i in generate(60, seed=61, width=96, height=72)}
    number, tasks = create_project(label_studio, "Shared", LABEL_CONFIG, images)
    running = hosts(
        LABEL_STUDIO_URL=label_studio.url,
        LABEL_STUDIO_API_KEY=label_studio.login.token,
        ML_BACKEND_AUTO_LABEL_SHARD="8",
    )
    key = LabelStudioClient(label_studio.url, label_studio.login.token).project(number).key
    cpu = torch.device("cpu")
    detector = Detector.pretrained(preset_named("tests.quick:PRESET", cpu), SHAPES, "none", cpu)
    detector.thresholds = dict.fromkeys(SHAPES, 0.5)
    seen = running.backend_of("server")
    for host in ("server", "a", "b"):
        make_live_on(running.backend_of(host), detector, key)
    workers = [running.start_worker("a"), running.start_worker("b")]
    try:
        done = wait_for(
            lambda: [
                job
                for job in _all_jobs(seen)
                if job.kind == JobKind.AUTOLABEL and job.state == JobState.DONE
            ],
            within=240,
            what=f"all tasks are predicted: {running.tail()}",
        )
        shards = [job for job in _all_jobs(seen) if job.kind == JobKind.AUTOLABEL_SHARD]
        assert len(shards) == 8
        assert {job.state for job in shards} == {JobState.DONE}
        assert {job.host for job in shards} == {"a", "b"}
        assert done[0].reason.values["imported"] == 60
        held = predictions_held(label_studio, number)
        assert held == Counter({(task, "v1"): 1 for task in tasks.values()})
    finally:
        _stop(workers)
        seen.database.close()


def make_live_on(backend: Backend, detector: Detector, key: str) -> None:
    """Puts a version into the artefact store of a host, and makes it live once."""
    with backend.database.reading() as session:
        known = session.scalar(select(ModelVersion).where(ModelVersion.name == "v1"))
    if known is None:
        make_live(backend, detector, "v1", key=key, label_config=LABEL_CONFIG)
    else:
        backend.artefacts.publish(key, "v1", detector.save, known.card)
    backend.database.close()


def _stop(workers: list[subprocess.Popen[bytes]]) -> None:
    for worker in workers:
        worker.terminate()
    for worker in workers:
        worker.wait(60)
