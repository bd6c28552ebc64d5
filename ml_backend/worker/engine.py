"""The queue's engine: DBOS takes entries from the queue and starts each on a thread of the worker.

DBOS keeps its tables in the database of the jobs. Its records say which worker has an entry; an
entry whose worker died is started again when a worker of the same host and device starts. A job of
a worker that does not come back is put into the queue again (`Jobs.recover`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable

from dbos import DBOS, DBOSConfig
from sqlalchemy import Engine, create_engine, event
from sqlalchemy.pool import ConnectionPoolEntry

from ml_backend.jobs.queue import APPLICATION, AT_ONCE, PROTOCOL, WORKFLOW
from ml_backend.store.database import QUEUE_SCHEMA, Database

_log = logging.getLogger(__name__)

_POLL = 0.5
"""Seconds between two looks into the queue."""
_WAIT_MS = 10_000
_KEEP = 24 * 3600.0
"""Seconds that entries are kept."""
_BATCH = 500


class QueueEngine:
    """Starts the jobs that are in the queue.

    DBOS is one for each process, and so is this.

    Args:
        database: where the queue is.
        executor: name of the worker; what a worker of this name had begun is started again.
        run: does one run of a job, on a thread of the engine's.
    """

    def __init__(self, database: Database, executor: str, run: Callable[[int, int], None]) -> None:
        self._database = database
        self._executor = executor
        self._run = run
        self._engine: Engine | None = None

    def start(self) -> None:
        """Begins to take jobs."""
        self._engine = _engine(self._database)
        config: DBOSConfig = {
            "name": APPLICATION,
            "system_database_url": self._database.url,
            "system_database_engine": self._engine,
            "dbos_system_schema": QUEUE_SCHEMA,
            "application_version": PROTOCOL,
            "executor_id": self._executor,
            # Its warnings would repeat several times a second while the database is away.
            "log_level": "ERROR",
            "use_listen_notify": False,
        }
        DBOS(config=config)

        def run_job(job_id: int, run: int) -> None:
            self._run(job_id, run)

        DBOS.workflow(name=WORKFLOW)(run_job)
        DBOS.launch()
        for kind, count in AT_ONCE.items():
            DBOS.register_queue(
                kind,
                worker_concurrency=count,
                polling_interval_sec=_POLL,
                on_conflict="always_update",
            )

    def stop(self) -> None:
        """Takes no more jobs; those that run must have been told to end before."""
        DBOS.destroy()
        if self._engine is not None:
            self._engine.dispose()

    @staticmethod
    def forget(entries: Iterable[str]) -> None:
        """Ends entries that no worker works on any more."""
        for entry in entries:
            DBOS.cancel_workflow(entry)

    @staticmethod
    def prune() -> None:
        """Deletes entries that were made more than a day ago and have ended."""
        ended = DBOS.list_workflows(
            status=["SUCCESS", "ERROR", "CANCELLED"],
            end_time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - _KEEP)),
            limit=_BATCH,
            load_input=False,
            load_output=False,
        )
        if ended:
            DBOS.delete_workflows([entry.workflow_id for entry in ended])
            _log.debug("%d old entries of the queue were deleted", len(ended))


def _engine(database: Database) -> Engine:
    """Connections of DBOS's own: it begins transactions in its own way."""
    if not database.is_sqlite:
        return create_engine(database.url, pool_pre_ping=True, pool_size=5, hide_parameters=True)
    engine = create_engine(database.url, hide_parameters=True)

    @event.listens_for(engine, "connect")
    def _configure(connection: object, _: ConnectionPoolEntry) -> None:
        connection.isolation_level = "IMMEDIATE"  # type: ignore[attr-defined]
        for pragma in (f"busy_timeout={_WAIT_MS}", "synchronous=NORMAL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")  # type: ignore[attr-defined]

    return engine
