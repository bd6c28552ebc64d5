"""The worker: runs the jobs that the queue gives it, each in a process of its own."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sqlalchemy.exc import DatabaseError

from ml_backend.jobs.failures import ended_by
from ml_backend.jobs.jobs import Jobs
from ml_backend.jobs.outcomes import JobEnded, RetryLater, TakenOver
from ml_backend.jobs.reports import End
from ml_backend.projects.clients import Clients
from ml_backend.reasons import Code, reason
from ml_backend.settings import Settings
from ml_backend.store.database import is_outside
from ml_backend.store.tables import Job
from ml_backend.worker.devices import own_device
from ml_backend.worker.housekeeping import Housekeeping
from ml_backend.worker.job_run import JobRun
from ml_backend.worker.preparation import Preparation
from ml_backend.worker.supervisor import HEARTBEAT, supervise

if TYPE_CHECKING:
    from ml_backend.worker.engine import QueueEngine

_log = logging.getLogger(__name__)

_LAST = 5.0
"""Seconds that running jobs have to end when the worker stops."""
_STANDBY = 2.0
"""Seconds between two looks of a worker without a device whether one has become free."""
_PAUSE = 1.0
"""Seconds until a database that is away is tried again."""
_AGAIN = 60.0
"""Seconds, for each attempt, until a job is tried again whose preparation failed unexpectedly."""


class Worker:
    """Takes jobs from the queue and keeps projects going, until the process is told to stop.

    Args:
        settings: name of the host, threads, budgets.
        jobs: claims jobs.
        label_studios: tells when a failing Label Studio is worth asking again.
        preparation: prepares a job before its process starts.
        engine: makes the engine of the queue from the worker's name and the function that runs a
            job.
        housekeeping: makes the housekeeping from a function that lists the jobs that run here, and
            the engine.
        job_run: makes the object that stores the reports of a claimed job.
    """

    def __init__(
        self,
        settings: Settings,
        jobs: Jobs,
        label_studios: Clients,
        preparation: Preparation,
        *,
        engine: Callable[[str, Callable[[int, int], None]], QueueEngine],
        housekeeping: Callable[[Callable[[], set[int]], QueueEngine], Housekeeping],
        job_run: Callable[[Job, threading.Event], JobRun],
    ) -> None:
        self._settings = settings
        self._jobs = jobs
        self._label_studios = label_studios
        self._preparation = preparation
        self._make_engine = engine
        self._make_housekeeping = housekeeping
        self._make_job_run = job_run
        self._stopping = threading.Event()
        self._device: str | None = None
        self._running: dict[int, Job] = {}
        self._housekeeping: Housekeeping | None = None

    def run(self, devices: Sequence[str]) -> None:
        """Works until SIGTERM, SIGINT or SIGHUP; running jobs are put back then, and not counted.

        A worker owns one device of its host. While other workers own all of them, it stands by.

        Args:
            devices: the devices of this host, as `cpu` or `cuda:N`.
        """
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(signum, lambda *_: self._stopping.set())
        owned = own_device(self._settings, devices)
        if owned is None:
            _log.info("other workers own every device (%s): standing by", ", ".join(devices))
        while owned is None:
            if self._stopping.wait(_STANDBY):
                return
            owned = own_device(self._settings, devices)
        self._device, lock = owned
        name = f"{self._settings.this_host}-{self._device}"
        engine = self._make_engine(name, self.run_job)
        self._housekeeping = self._make_housekeeping(lambda: set(self._running), engine)
        try:
            engine.start()
        except BaseException:
            # The threads of an engine that began would keep the process, and its device, alive.
            self._stopping.set()
            engine.stop()
            lock.release()
            raise
        _log.info("worker %s takes jobs", name)
        housekeeper = threading.Thread(
            target=self._housekeeping.run, args=(self._stopping,), name="housekeeping"
        )
        housekeeper.start()
        self._stopping.wait()
        # The threads of the running jobs end their processes and put the jobs back.
        until = time.monotonic() + _LAST
        while self._running and time.monotonic() < until:
            time.sleep(0.05)
        engine.stop()
        housekeeper.join()
        lock.release()

    def run_job(self, job_id: int, run: int) -> None:
        """Does one run of a job: claims it, prepares it, and supervises its process."""
        job = self._claim(job_id, run)
        if job is None:
            return
        self._running[job_id] = job
        try:
            job_run = self._make_job_run(job, self._stopping)
            if self._stopping.is_set():
                job_run.stopped()
                return
            with _beating(job_run):
                prepared = self._prepare(job, job_run)
            if prepared is not None:
                supervise(
                    job_run,
                    self._settings,
                    self._stopping,
                    device=self._device,
                    prepared=prepared,
                )
        except TakenOver:
            _log.warning("job %d has been given to another run", job_id)
        finally:
            del self._running[job_id]
            if self._housekeeping is not None:
                self._housekeeping.ended(job.project_id)

    def _claim(self, job_id: int, run: int) -> Job | None:
        """Claims a job; waits while the database is away: the queue starts an entry once."""
        while True:
            try:
                return self._jobs.claim(job_id, run, self._settings.this_host)
            except DatabaseError as error:
                if not is_outside(error) or self._stopping.wait(_PAUSE):
                    raise
                _log.warning("job %d is claimed later: %s", job_id, error.orig)

    def _prepare(self, job: Job, job_run: JobRun) -> dict[str, object] | None:
        """Prepares a job; None where it ends by that."""
        try:
            return self._preparation.prepare(job)
        except JobEnded as end:
            ended: JobEnded | None = end
        except TakenOver:
            raise
        except Exception as error:
            ended = ended_by(error, lambda: self._label_studios.wait_for(job.project_id))
            if ended is None:
                _log.exception("job %d could not be prepared", job.id)
                why = reason(Code.UNEXPECTED_ERROR, detail=str(error))
                ended = RetryLater(why, _AGAIN * job.attempt, counts=True)
        assert ended is not None
        job_run.apply(End.of(ended))
        return None


@contextmanager
def _beating(job_run: JobRun) -> Iterator[None]:
    """Keeps a job's heartbeat while it is prepared: reading back may take minutes."""
    done = threading.Event()

    def beat() -> None:
        while not done.wait(HEARTBEAT):
            try:
                job_run.beat()
            except TakenOver:
                # The next write of the run itself ends it.
                return

    thread = threading.Thread(target=beat, name="heartbeat")
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
