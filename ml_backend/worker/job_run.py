"""One run of a claimed job: stores what its process reports, each write under the run's claim."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TypeVar

from sqlalchemy.exc import DatabaseError

from ml_backend.jobs.jobs import Jobs
from ml_backend.jobs.outcomes import TakenOver
from ml_backend.jobs.reports import Checkpoint, ContactNote, End, Progress, Report, Sides
from ml_backend.projects.clients import Clients
from ml_backend.reasons import Code, Reason, reason
from ml_backend.store.database import Database, is_outside
from ml_backend.store.states import JobState
from ml_backend.store.tables import Job, Project
from ml_backend.training.sides import write_sides
from ml_backend.worker.results import Results

_log = logging.getLogger(__name__)

_PAUSE = 1.0
"""Seconds until a write that the database could not take is tried again."""
_Answer = TypeVar("_Answer")


class JobRun:
    """Stores the progress and the end of a claimed job.

    A database that is locked or away delays a write, and ends no work: progress is dropped, and
    everything else is written again until it is stored.

    Args:
        job: the job, as it was claimed.
        database: where everything is stored.
        jobs: its jobs.
        results: stores what a job that is done leaves behind.
        label_studios: notes how each Label Studio answers.
        stopping: set when the worker stops; nothing is tried again then.
    """

    def __init__(
        self,
        job: Job,
        database: Database,
        jobs: Jobs,
        results: Results,
        label_studios: Clients,
        stopping: threading.Event,
    ) -> None:
        self.job = job
        self._database = database
        self._jobs = jobs
        self._results = results
        self._label_studios = label_studios
        self._stopping = stopping

    def apply(self, report: Report) -> None:
        """Stores a report.

        Raises:
            TakenOver: another run has the job.
        """
        match report:
            case Progress():
                why = Reason.of(report.reason)
                self._if_possible(lambda: self._jobs.progress(self.job, report.fraction, why))
            case Checkpoint():
                self._until_stored(
                    lambda: self._jobs.advance(
                        self.job,
                        report.fraction,
                        Reason.of(report.reason),
                        report.checkpoint,
                        report.version,
                    )
                )
            case Sides():
                self._until_stored(lambda: self._store_sides(report))
            case ContactNote():
                self._label_studios.connectivity.write(report.url, report.kind, report.detail)
            case End():
                self._until_stored(lambda: self._end(report))

    def beat(self) -> None:
        """Notes that the worker lives.

        Raises:
            TakenOver: another run has the job.
        """
        self._if_possible(lambda: self._jobs.beat(self.job))

    def stopped(self) -> None:
        """Puts the job back because the worker stops; the attempt does not count."""
        try:
            self._jobs.put_back(self.job, reason(Code.WORKER_STOPPED), wait=0, counts=False)
        except TakenOver:
            return
        except DatabaseError as error:
            if not is_outside(error):
                raise
            _log.warning("job %d could not be put back: %s", self.job.id, error.orig)

    def crashed(self, why: Reason, wait: float) -> None:
        """Puts the job back because its process is gone; fails it after too many attempts."""
        _log.warning("job %d (%s): %s %s", self.job.id, self.job.kind, why.code, dict(why.values))
        self._until_stored(lambda: self._jobs.put_back(self.job, why, wait=wait * self.job.attempt))

    def _store_sides(self, sides: Sides) -> None:
        with self._database.session() as session:
            session.get_one(Project, self.job.project_id, with_for_update=True)
            self._jobs.check(session, self.job)
            write_sides(session, self.job.project_id, sides.rows)

    def _end(self, end: End) -> None:
        why = Reason.of(end.reason)
        _log.info("job %d (%s): %s, %s", self.job.id, self.job.kind, end.outcome, why.code)
        match end.outcome:
            case "done":
                self._results.store(self.job, end)
            case "refused":
                self._jobs.finish(self.job, JobState.REFUSED, why)
            case "failed":
                self._jobs.finish(self.job, JobState.FAILED, why)
            case "retry":
                self._jobs.put_back(self.job, why, wait=end.wait, counts=end.counts)

    def _if_possible(self, write: Callable[[], None]) -> None:
        try:
            write()
        except DatabaseError as error:
            if not is_outside(error):
                raise
            _log.warning("job %d: its progress is not stored: %s", self.job.id, error.orig)

    def _until_stored(self, write: Callable[[], _Answer]) -> None:
        while True:
            try:
                write()
                return
            except DatabaseError as error:
                if not is_outside(error) or self._stopping.wait(_PAUSE):
                    raise
                _log.warning("job %d: stored later: %s", self.job.id, error.orig)
