"""A project with its annotations, its jobs and the queue, for the tests of jobs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from sqlalchemy import select, text, update

from ml_backend.backend import Backend
from ml_backend.jobs.jobs import STALE_AFTER, Asked
from ml_backend.jobs.payloads import AutolabelCheckpoint, ShardPayload
from ml_backend.jobs.reports import End
from ml_backend.label_studio.events import (
    AnnotationInfo,
    AnnotationsChanged,
    ProjectInfo,
    TaskInfo,
    TasksChanged,
)
from ml_backend.reasons import Code, Reason, reason
from ml_backend.settings import load_settings
from ml_backend.store.database import QUEUE_SCHEMA
from ml_backend.store.states import JobKind, Trigger
from ml_backend.store.tables import Job, Project, now
from ml_backend.training.promotion import Verdict
from ml_backend.worker.job_run import JobRun

START = datetime(2026, 1, 1, tzinfo=UTC)
PROJECT = ProjectInfo("7.1795463889", 7, "cells", "<View/>", None, None)
CRASHED = reason(Code.PROCESS_CRASHED, kind=JobKind.TRAIN)


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry of the queue, as DBOS stores it.

    Attributes:
        id: the workflow's id.
        status: DBOS's status of the workflow.
        queue: the queue that holds it.
    """

    id: str
    status: str
    queue: str


class Loop:
    """A project, its annotations and its jobs.

    Args:
        url: address of an empty database.
        folder: `MODEL_DIR`.
        settings: more settings, by their environment names.
    """

    def __init__(self, url: str, folder: Path, **settings: str) -> None:
        chosen = {
            "MODEL_DIR": str(folder),
            "DATABASE_URL": url,
            "ML_BACKEND_TRAIN_MIN": "10",
            "ML_BACKEND_TRAIN_EVERY": "5",
            "ML_BACKEND_TRAIN_DELAY": "0",
            **settings,
        }
        self.backend = Backend(load_settings(chosen))
        self.database = self.backend.database
        self.jobs = self.backend.jobs
        self.requests = self.backend.requests
        self.project_id = self.introduce(PROJECT)
        schema = None if self.database.is_sqlite else QUEUE_SCHEMA
        self._entries = f"{schema}.workflow_status" if schema else "workflow_status"

    def introduce(self, project: ProjectInfo) -> int:
        """Makes a project known; answers its row's id."""
        return self.backend.ingest.introduce(project.key, project.id, label_config="<View/>").id

    def annotate(self, numbers: range, project: ProjectInfo = PROJECT) -> None:
        """Annotates tasks of these numbers, anew where that was done."""
        moment = now()
        for n in numbers:
            annotation = AnnotationInfo(n, n, [], False, False, None, None, 1, START, moment)
            event = AnnotationsChanged(project, (annotation,), (TaskInfo(n, {}, START),))
            self.backend.ingest.apply(event, project)

    def add_task(self, number: int) -> None:
        """Tells of a task without an annotation."""
        event = TasksChanged(PROJECT, (TaskInfo(number, {}, START),))
        self.backend.ingest.apply(event, PROJECT)

    def project(self) -> Project:
        """Reads the project's row."""
        with self.database.reading() as session:
            return session.get_one(Project, self.project_id)

    def ask(self, *, forced: bool = False) -> Asked:
        """Asks for a training; by the button, where forced."""
        if forced:
            return self.requests.training(self.project_id, trigger=Trigger.BUTTON, forced=True)
        return self.requests.training(self.project_id)

    def label(self, *, forced: bool = False) -> Asked:
        """Asks for an auto-labelling that must be needed; by the command, where forced."""
        trigger = Trigger.COMMAND if forced else Trigger.PROMOTION
        asked = self.requests.autolabel(self.project_id, trigger=trigger, forced=forced)
        assert asked is not None
        return asked

    def claim(self, number: int, host: str = "host-a") -> Job:
        """Claims a job for its newest run, as the queue's engine does."""
        job = self.jobs.claim(number, self.job(number).run, host)
        assert job is not None
        return job

    def started(self) -> Job:
        """Starts a training with ten annotated tasks; answers the claimed job."""
        if self.project().revision == 0:
            self.annotate(range(1, 11))
        return self.claim(self.ask().job)

    def sharded(self, *parts: tuple[int, int]) -> tuple[Job, list[Job]]:
        """Splits an auto-labelling of `v1` into shards, as the report of its process does.

        Args:
            parts: Label Studio's ids of the tasks of each shard: those above the first number, up
                to the second.

        Returns:
            The auto-labelling, and its shards, oldest first.
        """
        parent = self.claim(self.label(forced=True).job)
        payloads = [
            ShardPayload(version="v1", after=after, upto=upto, tasks=upto - after)
            for after, upto in parts
        ]
        self.run_of(parent).apply(
            End(
                outcome="done",
                reason=reason(Code.SHARDS_RUN, done=0, total=len(parts)).as_dict(),
                result={
                    "shards": [payload.stored() for payload in payloads],
                    "checkpoint": AutolabelCheckpoint(version="v1", sharded=True).stored(),
                },
            )
        )
        shards = [job for job in self.all() if job.parent_id == parent.id]
        return self.job(parent.id), shards

    def run_of(self, job: Job, stopping: threading.Event | None = None) -> JobRun:
        """Makes the store of a claimed job's reports."""
        return self.backend.job_run(job, stopping or threading.Event())

    def job(self, number: int) -> Job:
        """Reads a job that must be there."""
        job = self.jobs.get(number)
        assert job is not None
        return job

    def all(self) -> list[Job]:
        """Reads all jobs, oldest first."""
        with self.database.reading() as session:
            return list(session.scalars(select(Job).order_by(Job.id)))

    def entries(self) -> list[Entry]:
        """Reads all entries of the queue, by job and run."""
        statement = text(f"SELECT workflow_uuid, status, queue_name FROM {self._entries}")
        with self.database.reading() as session:
            found = [Entry(*row) for row in session.execute(statement)]
        return sorted(found, key=lambda entry: [int(n) for n in entry.id.split("-")[1::2]])

    def entry(self, number: int) -> Entry:
        """Reads the entry of a job's newest run, which must be there."""
        wanted = f"job-{number}-run-{self.job(number).run}"
        (found,) = [entry for entry in self.entries() if entry.id == wanted]
        return found

    def promoted(self, name: str) -> None:
        """Enters a version and makes it live."""
        self._record(name, Verdict(True, reason(Code.FIRST_VERSION, ap50=0.5)), 0)

    def trained(self, name: str, revision: int) -> None:
        """Enters a version that saw the annotations up to a revision, and is not made live."""
        verdict = Verdict(False, reason(Code.FIRST_VERSION_WEAK, ap50=0.05, needed=0.1))
        self._record(name, verdict, revision)

    def silent(self, number: int) -> None:
        """Lets a job's last heartbeat lie so far back that its worker counts as lost."""
        self._update(number, heartbeat_at=now() - STALE_AFTER - timedelta(seconds=1))

    def queued_long_ago(self, number: int, status: str | None) -> None:
        """Lets a job wait for long while its entry has a status; None: the entry is gone."""
        self._update(number, created_at=now() - STALE_AFTER - timedelta(seconds=1))
        entry = self.entry(number).id
        with self.database.session() as session:
            if status is None:
                session.execute(
                    text(f"DELETE FROM {self._entries} WHERE workflow_uuid = :entry"),
                    {"entry": entry},
                )
                return
            session.execute(
                text(
                    f"UPDATE {self._entries} SET status = :status, updated_at = 0 "
                    "WHERE workflow_uuid = :entry"
                ),
                {"entry": entry, "status": status},
            )

    def enough_for(self, number: int, seconds: float) -> None:
        """Lets the moment from which a waiting training had enough changes lie further back."""
        checkpoint = self.job(number).checkpoint
        since = datetime.fromisoformat(checkpoint["enough_since"]) - timedelta(seconds=seconds)
        self._update(number, checkpoint={**checkpoint, "enough_since": since.isoformat()})

    def close(self) -> None:
        """Gives the connections back."""
        self.database.close()

    def _record(self, name: str, verdict: Verdict, revision: int) -> None:
        with self.database.session() as session:
            live = session.get_one(Project, self.project_id).live_version
            self.backend.versions.record(
                session, self.project_id, name, {}, verdict, parent=live, revision=revision
            )

    def _update(self, number: int, **values: object) -> None:
        with self.database.session() as session:
            session.execute(update(Job).where(Job.id == number).values(**values))


def state_of(job: Job) -> tuple[object, ...]:
    """Collects everything of a job's row that a run could have written."""
    return (
        *(job.state, job.reason, job.progress, job.attempt, job.run, job.claim, job.host),
        *(job.checkpoint, job.version, job.not_before, job.heartbeat_at, job.finished_at),
    )


def tried_again(why: Reason, attempt: int, attempts: int) -> Reason:
    """Makes the reason of a job that was put back."""
    return reason(Code.TRIED_AGAIN, why=why, attempt=attempt, attempts=attempts)


MakeLoop = Callable[..., Loop]
"""Makes the loop of a test, with more settings."""
