"""Runs a job in a process of its own, and supervises the process.

The process runs at the lowest priority (nice 19) and uses half of the cores by default, so that
predictions stay fast: two PyTorch processes that each take every core slow each other five-fold.
The kernel kills the process with its worker. The worker kills it when it makes no progress. If the
process ends without a result, the job is tried again, or fails with a reason.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO

from ml_backend.jobs.outcomes import TakenOver
from ml_backend.jobs.reports import End, Progress, Report, parse_report
from ml_backend.reasons import Code, Reason, reason
from ml_backend.settings import Settings
from ml_backend.store.states import JobKind
from ml_backend.worker.job_run import JobRun

_log = logging.getLogger(__name__)

PROGRAM = "ml_backend.programs.job"
HEARTBEAT = 5.0
"""Seconds between two heartbeats of a job."""
_LOOK = 0.25
"""Seconds between two checks whether the worker stops: a stopping worker has little time."""
_SILENCE = 900.0
"""Seconds that a job may take without progress: an import into a project of 100,000 tasks may take
Label Studio minutes, and measuring thousands of images is one step."""
_ENDS_WITHIN = 20.0
"""Seconds in which a process ends after its last report; the heartbeat pauses meanwhile."""
_AGAIN = 5.0
"""Seconds, for each attempt, until a job whose process crashed is tried again."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds that the process of a job may take.

    Attributes:
        silence: without progress.
        training: in the steps of trainings, all together; None where nothing is trained. Reading
            images and measuring are not counted: of 10,000 images they take hours on a small
            machine, and each image that is done is progress.
    """

    silence: float
    training: float | None = None


def limits_of(kind: JobKind, settings: Settings) -> Limits:
    """The limits of a kind of job."""
    if kind == JobKind.TRAIN:
        budget = settings.train_budget
        # A training ends its steps within the budget. The rest is for a loaded machine, and for
        # what follows the steps before the next report.
        return Limits(silence=budget + _SILENCE, training=2 * budget + 2 * _SILENCE)
    return Limits(silence=_SILENCE)


def supervise(
    run: JobRun,
    settings: Settings,
    stopping: threading.Event,
    *,
    device: str | None = None,
    prepared: Mapping[str, object],
) -> None:
    """Runs a claimed job's process to its end, and stores what it reports.

    Args:
        run: the claimed job.
        settings: threads, and the budget of a training.
        stopping: set when the worker stops; the process is then ended and the job put back.
        device: the device that the worker owns, as a setting names it.
        prepared: the values that the preparation of the job answered.
    """
    process, pipe = _start(run, settings, device, prepared)
    watch = _Watch(limits_of(run.job.kind, settings))
    reports = _reports_of(pipe)
    beaten = time.monotonic()
    try:
        while True:
            for report in _next(reports):
                if report is None:
                    code = _wait(process)
                    run.crashed(_why_ended(code, run.job.kind), _AGAIN)
                    return
                watch.heard(report)
                run.apply(report)
                if isinstance(report, End):
                    _wait(process)
                    return
            if stopping.is_set():
                run.stopped()
                return
            if time.monotonic() > beaten + HEARTBEAT:
                beaten = time.monotonic()
                run.beat()
                if (why := watch.overdue(run.job.kind)) is not None:
                    run.crashed(why, _AGAIN)
                    return
    except TakenOver:
        _log.warning("job %d was silent for too long, and another run has it", run.job.id)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        pipe.close()


class _Watch:
    """Decides when the process of a job takes too long."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._came_on = time.monotonic()
        self._trained = 0.0
        self._training_since: float | None = None
        self._reached: object = None

    def heard(self, report: Report) -> None:
        """Notes a report; only one that differs from the last is progress."""
        moment = time.monotonic()
        reached = report.model_dump()
        if reached != self._reached:
            self._reached, self._came_on = reached, moment
        if not isinstance(report, Progress):
            return
        training = report.reason["code"] == Code.TRAINING
        if training and self._training_since is None:
            self._training_since = moment
        if not training and self._training_since is not None:
            self._trained += moment - self._training_since
            self._training_since = None

    def overdue(self, kind: JobKind) -> Reason | None:
        """Why the process is to be ended; None while it may go on."""
        moment = time.monotonic()
        limit, since = self._limits.training, self._training_since
        trained = self._trained + (moment - since if since is not None else 0.0)
        if limit is not None and trained > limit:
            return reason(Code.TIME_LIMIT, kind=kind)
        if moment > self._came_on + self._limits.silence:
            return reason(Code.NO_PROGRESS, kind=kind, seconds=self._limits.silence)
        return None


def _start(
    run: JobRun,
    settings: Settings,
    device: str | None,
    prepared: Mapping[str, object],
) -> tuple[subprocess.Popen[bytes], IO[bytes]]:
    threads = str(settings.training_threads)
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    if device is not None:
        environment["ML_BACKEND_DEVICE"] = device
    mine, theirs = os.pipe()
    try:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", PROGRAM, str(run.job.kind), str(run.job.id)),
                *(str(run.job.claim), str(os.getpid()), str(theirs), json.dumps(prepared)),
            ],
            env=environment,
            pass_fds=[theirs],
            start_new_session=True,
        )
    except BaseException:
        os.close(mine)
        raise
    finally:
        os.close(theirs)
    return process, os.fdopen(mine, "rb")


def _wait(process: subprocess.Popen[bytes]) -> int | None:
    """The status of a process that has reported its last; None where it does not end."""
    try:
        return process.wait(_ENDS_WITHIN)
    except subprocess.TimeoutExpired:
        _log.warning("a job's process did not end by itself, and is killed")
        return None


def _reports_of(pipe: IO[bytes]) -> queue.Queue[Report | None]:
    """The reports that come through a pipe, as they come; None after the last."""
    found: queue.Queue[Report | None] = queue.Queue()

    def read() -> None:
        try:
            for line in pipe:
                found.put(parse_report(line))
        except ValueError:
            # A process that is killed may leave half a line.
            _log.warning("a job's process sent half a report", exc_info=True)
        finally:
            found.put(None)

    threading.Thread(target=read, name="reports", daemon=True).start()
    return found


def _next(reports: queue.Queue[Report | None]) -> list[Report | None]:
    """The next report, None for the end of the pipe; empty where none comes for a moment."""
    try:
        return [reports.get(timeout=_LOOK)]
    except queue.Empty:
        return []


def _why_ended(code: int | None, kind: JobKind) -> Reason:
    if code is None:
        return reason(Code.PROCESS_CRASHED, kind=kind)
    if code == -signal.SIGKILL:
        return reason(Code.PROCESS_KILLED, kind=kind)
    if code < 0:
        return reason(Code.PROCESS_DIED, kind=kind, signal=signal.Signals(-code).name)
    return reason(Code.PROCESS_CRASHED, kind=kind)
