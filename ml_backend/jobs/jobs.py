"""Jobs: every piece of work is a row with a state and a reason that people can read.

The queue decides which worker runs a job. A worker claims the job when it starts, and each of its
writes carries the claim: a run that was taken for dead writes nothing any more.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import or_, select, update
from sqlalchemy.orm import Session, undefer

from ml_backend.jobs.outcomes import TakenOver
from ml_backend.jobs.queue import Queue, entry_id
from ml_backend.reasons import Code, Reason, reason
from ml_backend.store.database import Database
from ml_backend.store.states import ACTIVE, JobKind, JobState
from ml_backend.store.tables import Job, now

ATTEMPTS = 3
"""How often a job that crashes is tried."""

STALE_AFTER = timedelta(seconds=30)
"""A running job without a heartbeat for so long has lost its worker."""

_LOOKED_AT = 500
"""Jobs whose entries are looked up at once, the oldest first."""


@dataclass(frozen=True, slots=True)
class Asked:
    """The answer to whoever asked for a job.

    Attributes:
        job: the job's id.
        state: its state.
        reason: why it is in this state.
    """

    job: int
    state: JobState
    reason: Reason

    @classmethod
    def of(cls, job: Job) -> Asked:
        """The answer for a job as it is."""
        return cls(job.id, job.state, job.reason)


class Jobs:
    """Moves jobs from state to state, each move one transaction."""

    def __init__(self, database: Database, queue: Queue) -> None:
        self._database = database
        self._queue = queue

    def get(self, job_id: int) -> Job | None:
        """Reads one job, without its payload."""
        with self._database.reading() as session:
            return session.get(Job, job_id)

    def claim(self, job_id: int, run: int, host: str) -> Job | None:
        """Takes a job for a run of it; answers the job with its payload and the new claim.

        A job that runs already under the same run is taken over: the queue starts a run again only
        when the worker that had it is gone.

        Args:
            job_id: the job.
            run: the run that the queue started.
            host: where the worker runs.

        Returns:
            The job; None where the entry is out of date, or the job failed for good by now.
        """
        with self._database.session() as session:
            job = session.get(Job, job_id, with_for_update=True, options=[undefer(Job.payload)])
            if (
                job is None
                or job.run != run
                or job.state
                not in (
                    JobState.QUEUED,
                    JobState.RUNNING,
                )
            ):
                return None
            if job.state == JobState.RUNNING and job.attempt >= ATTEMPTS:
                _give_up(job, reason(Code.WORKER_LOST))
                self._after_shard(session, job)
                return None
            job.state = JobState.RUNNING
            job.claim = secrets.token_hex(16)
            job.host = host
            job.attempt += 1
            job.progress = 0.0
            job.started_at = job.heartbeat_at = now()
            job.not_before = job.finished_at = None
            return job

    def claimed(self, job_id: int, claim: str) -> Job | None:
        """Reads a job with its payload; None where the claim does not hold any more."""
        with self._database.reading() as session:
            return session.scalar(
                select(Job)
                .where(Job.id == job_id, Job.claim == claim, Job.state == JobState.RUNNING)
                .options(undefer(Job.payload))
            )

    def holds(self, job_id: int, claim: str) -> bool:
        """Whether a claim still holds; writes nothing."""
        with self._database.reading() as session:
            held = session.scalar(
                select(Job.claim).where(Job.id == job_id, Job.state == JobState.RUNNING)
            )
            return held == claim

    def beat(self, job: Job) -> None:
        """Notes that the worker of a claimed job lives.

        Raises:
            TakenOver: another run has the job.
        """
        self._write(job)

    def progress(self, job: Job, fraction: float, why: Reason) -> None:
        """Notes how far a claimed job is.

        Args:
            job: the job, as it was claimed.
            fraction: of it that is done, in `[0, 1]`.
            why: the same as a reason.

        Raises:
            TakenOver: another run has the job.
        """
        self._write(job, progress=fraction, reason=why)

    def advance(
        self,
        job: Job,
        fraction: float,
        why: Reason,
        checkpoint: dict[str, Any],
        version: str | None = None,
    ) -> None:
        """Notes how far a claimed job is, with a checkpoint; resets its count of attempts.

        Args:
            job: the job, as it was claimed.
            fraction: of it that is done, in `[0, 1]`.
            why: the same as a reason.
            checkpoint: the state from which the next run continues.
            version: the model version that works on it.

        Raises:
            TakenOver: another run has the job.
        """
        values = {} if version is None else {"version": version}
        self._write(job, progress=fraction, reason=why, checkpoint=checkpoint, attempt=1, **values)

    def finish(
        self,
        job: Job,
        state: JobState,
        why: Reason,
        *,
        version: str | None = None,
        session: Session | None = None,
    ) -> None:
        """Ends a claimed job.

        Args:
            job: the job, as it was claimed.
            state: `DONE`, `FAILED` or `REFUSED`.
            why: the result, or why there is none.
            version: the model version that was made or that predicted.
            session: the transaction to end it in, along with what else is written.

        Raises:
            TakenOver: another run has the job.
        """
        values: dict[str, Any] = {"state": state, "reason": why, "finished_at": now()}
        if state == JobState.DONE:
            values["progress"] = 1.0
        if version is not None:
            values["version"] = version
        if session is None:
            with self._database.session() as own:
                _write(own, job, claim=None, **values)
                self._after_shard(own, job)
            return
        _write(session, job, claim=None, **values)
        self._after_shard(session, job)

    def put_back(self, job: Job, why: Reason, *, wait: float, counts: bool = True) -> JobState:
        """Puts a claimed job back into the queue, or fails it after too many attempts.

        Args:
            job: the job, as it was claimed.
            why: what went wrong.
            wait: seconds before a worker may take it again.
            counts: whether the attempt counts; a stop of the worker is not the job's fault.

        Returns:
            The job's state: `QUEUED` or `FAILED`.

        Raises:
            TakenOver: another run has the job.
        """
        with self._database.session() as session:
            held = _held(session, job)
            return self._put_back(session, held, why, wait=wait, counts=counts)

    def check(self, session: Session, job: Job) -> None:
        """Makes sure, as part of a transaction, that a run still has the job that it claimed.

        Raises:
            TakenOver: another run has the job.
        """
        _held(session, job)

    def wait_for_shards(
        self, session: Session, job: Job, why: Reason, checkpoint: dict[str, Any]
    ) -> None:
        """Lets a claimed auto-labelling wait until all of its shards have ended.

        Raises:
            TakenOver: another run has the job.
        """
        _write(
            session,
            job,
            state=JobState.WAITING,
            claim=None,
            reason=why,
            checkpoint=checkpoint,
            progress=0.0,
            attempt=0,
        )

    def recover(self, mine: Collection[int] = ()) -> list[str]:
        """Puts back the jobs whose worker died on another host.

        Args:
            mine: jobs that this process runs; their heartbeats may be late where the database was
                locked.

        Returns:
            Entries of the queue that nobody works on any more.
        """
        with self._database.reading() as session:
            silent = session.scalars(
                select(Job.id).where(
                    Job.state == JobState.RUNNING, Job.heartbeat_at < now() - STALE_AFTER
                )
            ).all()
        lost: list[tuple[int, int]] = []
        for number in silent:
            if number in mine:
                continue
            with self._database.session() as session:
                job = session.scalar(
                    select(Job)
                    .where(
                        Job.id == number,
                        Job.state == JobState.RUNNING,
                        Job.heartbeat_at < now() - STALE_AFTER,
                    )
                    .with_for_update(skip_locked=True)
                )
                if job is None:
                    continue
                lost.append((job.id, job.run))
                self._put_back(session, job, reason(Code.WORKER_LOST), wait=0, counts=True)
        return [entry_id(number, run) for number, run in lost]

    def requeue_lost(self) -> None:
        """Puts the jobs into the queue again whose entry there starts nothing any more.

        A worker may die between taking an entry and claiming its job; and an earlier release had a
        queue of its own.
        """
        before = now() - STALE_AFTER
        with self._database.reading() as session:
            queued = session.execute(
                select(Job.id, Job.run)
                .where(
                    Job.state == JobState.QUEUED,
                    Job.created_at < before,
                    or_(Job.not_before.is_(None), Job.not_before < before),
                )
                .order_by(Job.id)
                .limit(_LOOKED_AT)
            ).all()
        runs = {entry_id(number, run): (number, run) for number, run in queued}
        for entry in self._queue.lost(runs):
            number, run = runs[entry]
            with self._database.session() as session:
                job = session.get_one(Job, number, with_for_update=True)
                if job.state == JobState.QUEUED and job.run == run:
                    self._queue.put(session, job)

    def _put_back(
        self, session: Session, job: Job, why: Reason, *, wait: float, counts: bool
    ) -> JobState:
        job.claim = None
        if not counts:
            job.attempt -= 1
        if job.attempt >= ATTEMPTS:
            _give_up(job, why)
            self._after_shard(session, job)
            return job.state
        job.state = JobState.QUEUED
        job.reason = reason(Code.TRIED_AGAIN, why=why, attempt=job.attempt + 1, attempts=ATTEMPTS)
        job.not_before = now() + timedelta(seconds=wait) if wait else None
        self._queue.put(session, job, wait=wait)
        return job.state

    def _after_shard(self, session: Session, job: Job) -> None:
        """Tells an auto-labelling that one of its shards has ended; after the last it goes on."""
        if job.kind != JobKind.AUTOLABEL_SHARD or job.parent_id is None:
            return
        session.flush()
        parent = session.get_one(Job, job.parent_id, with_for_update=True)
        if parent.state != JobState.WAITING:
            return
        states = session.execute(select(Job.id, Job.state).where(Job.parent_id == parent.id)).all()
        ended = sum(state not in ACTIVE for _, state in states)
        parent.reason = reason(Code.SHARDS_RUN, done=ended, total=len(states))
        parent.progress = ended / len(states)
        if ended == len(states):
            parent.state = JobState.QUEUED
            self._queue.put(session, parent)

    def _write(self, job: Job, **values: Any) -> None:
        changed = self._database.change(
            update(Job)
            .where(Job.id == job.id, Job.state == JobState.RUNNING, Job.claim == job.claim)
            .values(heartbeat_at=now(), **values)
        )
        if not changed:
            raise TakenOver


def _held(session: Session, job: Job) -> Job:
    held = session.scalar(
        select(Job)
        .where(Job.id == job.id, Job.state == JobState.RUNNING, Job.claim == job.claim)
        .with_for_update()
    )
    if held is None:
        raise TakenOver
    return held


def _write(session: Session, job: Job, **values: Any) -> None:
    held = _held(session, job)
    for name, value in values.items():
        setattr(held, name, value)
    held.heartbeat_at = now()
    session.flush()


def _give_up(job: Job, why: Reason) -> None:
    job.state = JobState.FAILED
    job.claim = None
    job.reason = reason(Code.GAVE_UP, attempts=job.attempt, why=why)
    job.finished_at = now()
