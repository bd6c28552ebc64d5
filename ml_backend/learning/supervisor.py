"""Runs a training in a process of its own, and knows what became of it.

Predictions are protected so: the process runs at the lowest priority (nice 19) and uses half the
cores by default, because two torch processes that each take every core slow each other five-fold.
It dies with its worker, is ended when it takes far too long, and whatever kills it, the job is
tried again or says what happened.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass

from ml_backend.learning.jobs import Jobs
from ml_backend.settings import Settings

_log = logging.getLogger(__name__)

REFUSED = 3
"""Exit status of a training that had nothing to learn from; its job says why already."""
_HEARTBEAT = 5.0
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Ended:
    """How a training process ended.

    Attributes:
        status: `done`, `refused`, `crashed` or `stopped` (because the worker stops).
        reason: what went wrong, in words.
    """

    status: str
    reason: str = ""


def supervise(job_id: int, jobs: Jobs, settings: Settings, stopping: threading.Event) -> Ended:
    """Runs the training of a claimed job to its end, keeping the job's heart beating.

    Args:
        job_id: the job.
        jobs: where its heart beats.
        settings: budget and threads.
        stopping: set when the worker stops; the training is then ended.
    """
    threads = str(settings.training_threads)
    process = subprocess.Popen(
        [sys.executable, "-m", "ml_backend.learning.training_process", str(job_id)],
        env={**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
        start_new_session=True,
    )
    # Reading images and measuring come on top of the budget of the training itself.
    limit = time.monotonic() + 2 * settings.train_budget + 1800
    try:
        while True:
            with suppress(subprocess.TimeoutExpired):
                return _ended(process.wait(timeout=_HEARTBEAT))
            jobs.beat(job_id)
            if stopping.is_set():
                return Ended("stopped", "the worker was stopped")
            if time.monotonic() > limit:
                return Ended("crashed", "it went far beyond its time budget and was ended")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def lower_priority() -> None:
    """Makes this process give way to every other, and die with its parent (Linux)."""
    os.nice(19)
    die_with_parent(signal.SIGKILL)


def die_with_parent(signum: signal.Signals = signal.SIGTERM) -> None:
    """Makes this process get a signal when the thread that started it ends, however (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signum)


def _ended(code: int) -> Ended:
    if code == 0:
        return Ended("done")
    if code == REFUSED:
        return Ended("refused")
    if code == -signal.SIGKILL:
        return Ended("crashed", "the training was killed (out of memory, most likely)")
    if code < 0:
        return Ended("crashed", f"the training died of {signal.Signals(-code).name}")
    return Ended("crashed", "the training crashed; the log has its traceback")
