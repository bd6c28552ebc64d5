"""Runs a training, or predictions by the thousand, in a process of its own.

Predictions are protected so: the process runs at the lowest priority (nice 19) and uses half the
cores by default, because two torch processes that each take every core slow each other five-fold.
It dies with its worker, is ended when it takes far too long or comes no further, and whatever
kills it is known: the job is tried again, or says what happened.
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

from ml_backend.jobs.jobs import Jobs
from ml_backend.settings import Settings

_log = logging.getLogger(__name__)

REFUSED = 3
"""Exit status of a process that could not do what was asked; its job says why already."""
_HEARTBEAT = 5.0
_LOOK = 0.25
"""Seconds between two looks whether the worker stops: it has little time for that."""
_SILENCE = 900.0
"""An import into a project of 100,000 tasks may take Label Studio minutes."""
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Ended:
    """How a process ended.

    Attributes:
        status: `done`, `refused`, `crashed` or `stopped` (because the worker stops).
        reason: what went wrong, in words.
    """

    status: str
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Program:
    """What runs in a process of its own.

    Attributes:
        module: of the process; it gets the number of the job.
        what: it is called in words.
        limit: seconds that it may take in all; None for no limit.
        silence: seconds that it may go on without its job coming any further; None for no limit.
    """

    module: str
    what: str
    limit: float | None = None
    silence: float | None = None


def training(settings: Settings) -> Program:
    """The program that trains."""
    return Program(
        "ml_backend.programs.train",
        "the training",
        # Reading images and measuring come on top of the budget of the training itself.
        limit=2 * settings.train_budget + 1800,
        # It tells of every step; measuring thousands of images is done in one.
        silence=settings.train_budget + _SILENCE,
    )


AUTO_LABELLING = Program("ml_backend.programs.predict", "auto-labelling", silence=_SILENCE)
"""The program that predicts the tasks without an annotation: for hours, where there are many."""
HANDED_OVER = Program(
    "ml_backend.programs.predict", "predicting what was left over", silence=_SILENCE
)
"""The same, for the tasks that a request for predictions left over."""


def supervise(
    program: Program, job_id: int, jobs: Jobs, settings: Settings, stopping: threading.Event
) -> Ended:
    """Runs a claimed job's program to its end, keeping the job's heart beating.

    Args:
        program: what is run.
        job_id: the job.
        jobs: where its heart beats.
        settings: threads.
        stopping: set when the worker stops; the process is then ended.
    """
    threads = str(settings.training_threads)
    process = subprocess.Popen(
        [sys.executable, "-m", program.module, str(job_id), str(os.getpid())],
        env={**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
        start_new_session=True,
    )
    began = came_on = beaten = time.monotonic()
    reached: object = None
    try:
        while True:
            with suppress(subprocess.TimeoutExpired):
                return _ended(process.wait(timeout=_LOOK), program.what)
            if stopping.is_set():
                return Ended("stopped", "the worker was stopped")
            if time.monotonic() < beaten + _HEARTBEAT:
                continue
            jobs.beat(job_id)
            beaten = time.monotonic()
            if program.limit is not None and time.monotonic() > began + program.limit:
                return Ended(
                    "crashed", f"{program.what} went far beyond its time budget and was ended"
                )
            if (now_at := _reached(jobs, job_id)) != reached:
                reached, came_on = now_at, time.monotonic()
            if program.silence is not None and time.monotonic() > came_on + program.silence:
                return Ended(
                    "crashed",
                    f"{program.what} came no further for {program.silence / 60:.3g} minutes and "
                    "was ended",
                )
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def lower_priority(parent: int) -> None:
    """Makes this process give way to every other, and die with its parent (Linux).

    Args:
        parent: its process id; killed by now, it could no longer tell us.
    """
    os.nice(19)
    die_with_parent(signal.SIGKILL)
    if os.getppid() != parent:
        raise SystemExit("whoever started this is gone")


def die_with_parent(signum: signal.Signals = signal.SIGTERM) -> None:
    """Makes this process get a signal when the thread that started it ends, however (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signum)


def _reached(jobs: Jobs, job_id: int) -> object:
    job = jobs.get(job_id)
    return job and (job.progress, job.reason)


def _ended(code: int, what: str) -> Ended:
    if code == 0:
        return Ended("done")
    if code == REFUSED:
        return Ended("refused")
    if code == -signal.SIGKILL:
        return Ended("crashed", f"{what} was killed (out of memory, most likely)")
    if code < 0:
        return Ended("crashed", f"{what} died of {signal.Signals(-code).name}")
    return Ended("crashed", f"{what} crashed; the log has its traceback")
