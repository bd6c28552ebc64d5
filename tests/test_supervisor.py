"""Supervise a process that reports as a training does, under limits of a few seconds."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from ml_backend.reasons import Code, Reason, reason
from ml_backend.settings import load_settings
from ml_backend.store.states import JobKind, JobState
from ml_backend.store.tables import Job
from ml_backend.worker import supervisor
from ml_backend.worker.supervisor import Limits, limits_of, supervise
from tests.conftest import ROOT
from tests.job_loop import Loop
from tests.reporting_job import END

LIMIT = 3.0
"""Seconds of silence, and of training, that are allowed."""
LONGER = LIMIT + 2.5

Supervise = Callable[[Sequence[tuple[Code, float, bool]]], Job]


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[Loop]:
    """A project with annotations, its jobs and the queue."""
    loop = Loop(f"sqlite:///{tmp_path / 'test.db'}", tmp_path)
    yield loop
    loop.close()


@pytest.fixture
def supervised(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> Supervise:
    """Return a function that supervises a process that reports stages; it returns the job."""
    monkeypatch.setattr(supervisor, "PROGRAM", "tests.reporting_job")
    monkeypatch.setattr(supervisor, "HEARTBEAT", 0.5)
    monkeypatch.setattr(
        supervisor, "limits_of", lambda kind, settings: Limits(silence=LIMIT, training=LIMIT)
    )
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def run(stages: Sequence[tuple[Code, float, bool]]) -> Job:
        job = loop.started()
        prepared: dict[str, Any] = {"stages": list(stages)}
        supervise(loop.run_of(job), loop.backend.settings, threading.Event(), prepared=prepared)
        return loop.job(job.id)

    return run


def _cause(job: Job) -> Reason:
    """Return the reason for which a job was put back."""
    assert job.state == JobState.QUEUED
    assert job.reason.code == Code.TRIED_AGAIN
    return Reason.of(job.reason.values["why"])


@pytest.mark.slow
def test_supervise_reading_and_measuring_beyond_the_limits_are_not_ended(
    supervised: Supervise,
) -> None:
    # As three folds of many images do: each reads, trains for a while, and measures.
    job = supervised(
        [
            (Code.READING_IMAGES, LONGER, True),
            (Code.TRAINING, 0.5, True),
            (Code.MEASURING, LONGER, True),
            (Code.TRAINING, 0.5, True),
        ]
    )
    assert (job.state, job.reason) == (JobState.FAILED, reason(Code.PLAIN, text=END))


def test_supervise_reports_that_repeat_are_silence_and_end_the_process(
    supervised: Supervise,
) -> None:
    job = supervised([(Code.READING_IMAGES, 60, False)])
    assert _cause(job) == reason(Code.NO_PROGRESS, kind=JobKind.TRAIN, seconds=LIMIT)


def test_supervise_training_beyond_its_limit_in_parts_ends_the_process(
    supervised: Supervise,
) -> None:
    job = supervised(
        [(Code.TRAINING, 2, True), (Code.MEASURING, 1, True), (Code.TRAINING, 60, True)]
    )
    assert _cause(job) == reason(Code.TIME_LIMIT, kind=JobKind.TRAIN)


def test_limits_of_training_are_above_its_budget() -> None:
    settings = load_settings({"ML_BACKEND_TRAIN_BUDGET": "3600"})
    limits = limits_of(JobKind.TRAIN, settings)
    assert limits.silence > 3600
    assert limits.training is not None and limits.training > 3600
    assert limits_of(JobKind.PREDICT, settings).training is None
