"""Run the worker as a process: stopping it costs its jobs no attempt, and a locked database ends
none of them."""

from __future__ import annotations

import base64
import copy
import signal

import psutil
from sqlalchemy import select

from ml_backend.backend import Backend
from ml_backend.demo.shapes import ShapeImage, generate
from ml_backend.settings import load_settings
from ml_backend.store.states import JobKind, JobState
from ml_backend.store.tables import Job
from ml_backend.wording import words
from tests.conftest import MakeBackend, RunningBackend, capture, wait_for


def _annotate(backend: RunningBackend, number: int, image: ShapeImage) -> None:
    body = copy.deepcopy(capture("POST_webhook_ANNOTATION_CREATED"))
    encoded = base64.b64encode(image.encoded()).decode()
    body["annotation"] |= {"id": number, "task": number}
    body["task"] |= {"id": number, "data": {"image": f"data:image/png;base64,{encoded}"}}
    assert backend.post("/webhook", body).ok


def _trainings(backend: RunningBackend) -> list[psutil.Process]:
    return [
        child
        for child in psutil.Process(backend.pid).children(recursive=True)
        if {"ml_backend.programs.job", "train"} <= set(child.cmdline())
    ]


def test_worker_told_to_stop_puts_its_training_back_without_costing_an_attempt(
    make_backend: MakeBackend,
) -> None:
    backend = make_backend(ML_BACKEND_TRAIN_MIN="100", ML_BACKEND_TRAIN_BUDGET="300")
    seen = Backend(load_settings(backend.settings))

    def job() -> Job:
        with seen.database.reading() as session:
            return session.scalars(select(Job).where(Job.kind == JobKind.TRAIN)).one()

    for number, image in enumerate(generate(8, seed=31, width=128, height=96), 1):
        _annotate(backend, number, image)
    assert backend.post("/webhook", capture("POST_webhook_START_TRAINING")).ok
    for signum in (signal.SIGTERM, signal.SIGINT):
        (process,) = wait_for(lambda: _trainings(backend), within=20, what="a training runs")
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
