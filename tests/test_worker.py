"""Run the worker as a process: stopping it costs its jobs no attempt, and a locked database ends
none of them."""

from __future__ import annotations

import base64
import copy
import signal
import sqlite3
from contextlib import closing
from pathlib import Path

import psutil
from sqlalchemy import select

from ml_backend.backend import Backend
from ml_backend.demo.shapes import ShapeImage, generate
from ml_backend.settings import load_settings
from ml_backend.store.states import JobKind, JobState
from ml_backend.store.tables import Job
from ml_backend.wording import words
from tests.conftest import ROOT, MakeBackend, RunningBackend, capture, wait_for


def _annotate(backend: RunningBackend, number: int, image: ShapeImage) -> None:
    body = copy.deepcopy(capture("POST_webhook_ANNOTATION_CREATED"))
    encoded = base64.b64encode(image.encoded()).decode()
    body["annotation"] |= {"id": number, "task": number}
    body["task"] |= {"id": number, "data": {"image": f"data:image/png;base64,{encoded}"}}
    assert backend.post("/webhook", body).ok


def _training(seen: Backend) -> Job:
    with seen.database.reading() as session:
        return session.scalars(select(Job).where(Job.kind == JobKind.TRAIN)).one()


def test_worker_told_to_stop_puts_its_training_back_without_costing_an_attempt(
    make_backend: MakeBackend,
) -> None:
    backend = make_backend(ML_BACKEND_TRAIN_MIN="100", ML_BACKEND_TRAIN_BUDGET="300")
    seen = Backend(load_settings(backend.settings))

    def job() -> Job:
        return _training(seen)

    for number, image in enumerate(generate(8, seed=31, width=128, height=96), 1):
        _annotate(backend, number, image)
    assert backend.post("/webhook", capture("POST_webhook_START_TRAINING")).ok
    for signum in (signal.SIGTERM, signal.SIGINT):
        (process,) = wait_for(
            lambda: backend.job_processes("train"), within=20, what="a training runs"
        )
        assert (job().state, job().attempt) == (JobState.RUNNING, 1)
        psutil.Process(backend.pid).send_signal(signum)
        # Docker, for one, has no more patience than that.
        wait_for(lambda: job().state == JobState.QUEUED, within=9, what="it is put back")
        assert not process.is_running()
        assert job().attempt == 0
        backend.stop()
        assert words(job().reason).startswith("the worker was stopped; tried again (attempt 1 of")
        backend.start()
    wait_for(lambda: job().state == JobState.RUNNING, within=8, what="it is begun again at once")
    assert job().attempt == 1


def _has_ended(process: psutil.Process) -> bool:
    """Return whether a process has ended, even if its worker has not asked for its status yet."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_worker_database_locked_for_longer_than_a_write_waits_ends_no_training(
    make_backend: MakeBackend, tmp_path: Path
) -> None:
    hold = tmp_path / "hold"
    backend = make_backend(
        ML_BACKEND_PRESET="tests.quick:PRESET",
        ML_BACKEND_TRAIN_MIN="100",
        ML_BACKEND_AUTO_LABEL="false",
        PYTHONPATH=str(ROOT),
        TEST_HOLD=str(hold),
    )
    # The start builds the preset's detector as well.
    hold.touch()
    seen = Backend(load_settings(backend.settings))
    for number, image in enumerate(generate(8, seed=32, width=96, height=72), 1):
        _annotate(backend, number, image)
    assert backend.post("/webhook", capture("POST_webhook_START_TRAINING")).ok
    (process,) = wait_for(lambda: backend.job_processes("train"), within=60, what="a training runs")
    assert _training(seen).state == JobState.RUNNING
    file = backend.model_dir / "ml-backend.db"
    with closing(sqlite3.connect(file, isolation_level=None, timeout=30)) as other:
        other.execute("BEGIN EXCLUSIVE")
        hold.unlink()
        # A write waits for 10 s before it gives up; the training goes on meanwhile, to its end.
        wait_for(lambda: _has_ended(process), within=120, what="the training's process has ended")
        wait_for(
            lambda: "stored later: database is locked" in backend.log.read_text(),
            within=60,
            what=f"a write of the worker gave up waiting: {backend.tail()}",
        )
        assert _training(seen).state == JobState.RUNNING
        other.execute("ROLLBACK")
    wait_for(
        lambda: _training(seen).state != JobState.RUNNING,
        within=60,
        what=f"the training is stored: {backend.tail()}",
    )
    training = _training(seen)
    assert (training.state, training.attempt) == (JobState.DONE, 1), words(training.reason)
    assert training.version is not None
    seen.database.close()
