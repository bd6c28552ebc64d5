"""The queue of jobs: durable workflows of DBOS, in the same database as the jobs themselves.

A job is put into the queue in the transaction that writes its row, so that no job exists without
its entry. DBOS then decides which worker starts it and when, keeps delays, limits how many run at
once, and starts again what a worker that died had begun when that worker comes back.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from sqlalchemy.orm import Session

from ml_backend.store.database import QUEUE_SCHEMA, Database
from ml_backend.store.states import JobKind
from ml_backend.store.tables import Job

if TYPE_CHECKING:
    from dbos import DBOSClient, EnqueueOptions

APPLICATION = "ml-backend"
PROTOCOL = "1"
"""Version of the entries: workers start only those of their own."""
WORKFLOW = "run_job"
_LOST_AFTER = 30.0
"""Seconds after which an entry that a worker has taken, but whose job it did not claim, is lost."""
_ALIVE = frozenset({"ENQUEUED", "DELAYED"})
AT_ONCE: Mapping[JobKind, int] = {
    JobKind.TRAIN: 1,
    JobKind.LIVE_HEAD: 1,
    JobKind.AUTOLABEL: 1,
    JobKind.AUTOLABEL_SHARD: 1,
    JobKind.PREDICT: 1,
    JobKind.REMOVE_STALE: 1,
}
"""Jobs of a kind that one worker runs at once: more would only slow each other on its device."""


class Queue:
    """Puts jobs into the queue.

    Args:
        database: where the jobs are.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._client: DBOSClient | None = None

    def put(self, session: Session, job: Job, *, wait: float = 0.0) -> None:
        """Puts a job into the queue, as part of the session's transaction.

        An entry of an earlier run of the job does nothing any more.

        Args:
            session: writes the job's row.
            job: the job.
            wait: seconds before a worker may take it.
        """
        job.run = (job.run or 0) + 1
        session.flush()
        options: EnqueueOptions = {
            "workflow_name": WORKFLOW,
            "queue_name": job.kind,
            "workflow_id": entry_id(job.id, job.run),
            "app_version": PROTOCOL,
        }
        if wait > 0:
            options["delay_seconds"] = wait
        self.open().enqueue_in_transaction(session, options, job.id, job.run)

    def lost(self, entries: Collection[str]) -> set[str]:
        """Finds the entries that start nothing any more.

        Args:
            entries: entries of jobs that wait in the queue.

        Returns:
            Those that are gone, that have ended, or that a worker took long ago and died with.
        """
        if not entries:
            return set()
        found = self.open().list_workflows(
            workflow_ids=list(entries), load_input=False, load_output=False
        )
        latest = (time.time() - _LOST_AFTER) * 1000
        alive = {
            entry.workflow_id
            for entry in found
            if entry.status in _ALIVE
            or (entry.status == "PENDING" and (entry.updated_at or 0) > latest)
        }
        return set(entries) - alive

    def open(self) -> DBOSClient:
        """Opens the client of the queue's engine, at the first call.

        Most commands and the processes of jobs put nothing into the queue: DBOS takes half a second
        to import.
        """
        if self._client is None:
            from dbos import DBOSClient

            logging.getLogger("dbos").setLevel(logging.ERROR)
            self._client = DBOSClient(
                system_database_engine=self._database.engine,
                dbos_system_schema=QUEUE_SCHEMA,
                application_name=APPLICATION,
                lazy=True,
            )
        return self._client


def entry_id(job_id: int, run: int) -> str:
    """The queue's own id of a run of a job."""
    return f"job-{job_id}-run-{run}"
