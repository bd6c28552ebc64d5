"""Stores the result of a finished job, in the transaction that ends the job."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from sqlalchemy import select
from sqlalchemy.exc import DatabaseError
from sqlalchemy.orm import Session

from ml_backend.jobs.jobs import Jobs
from ml_backend.jobs.outcomes import TakenOver
from ml_backend.jobs.payloads import ShardPayload
from ml_backend.jobs.queue import Queue
from ml_backend.jobs.reports import End
from ml_backend.jobs.requests import Requests
from ml_backend.reasons import Reason
from ml_backend.settings import Settings
from ml_backend.store.artefacts import ArtefactStore
from ml_backend.store.database import Database
from ml_backend.store.states import JobKind, JobState
from ml_backend.store.tables import Job, ModelVersion, Project
from ml_backend.training.promotion import Verdict, Versions

_log = logging.getLogger(__name__)


class Results:
    """Stores results by the kind of the job.

    Args:
        settings: how many versions are kept.
        database: where everything is stored.
        jobs: ends jobs.
        requests: asks for the jobs that follow.
        queue: receives the shards of an auto-labelling.
        versions: receives new versions.
        artefacts: holds their artefacts.
    """

    def __init__(
        self,
        settings: Settings,
        database: Database,
        jobs: Jobs,
        requests: Requests,
        queue: Queue,
        versions: Versions,
        artefacts: ArtefactStore,
    ) -> None:
        self._settings = settings
        self._database = database
        self._jobs = jobs
        self._requests = requests
        self._queue = queue
        self._versions = versions
        self._artefacts = artefacts

    def store(self, job: Job, end: End) -> None:
        """Ends a job as done, and stores its result.

        Raises:
            TakenOver: another run has the job; nothing is stored.
        """
        why, result = Reason.of(end.reason), end.result or {}
        if job.kind in (JobKind.TRAIN, JobKind.LIVE_HEAD):
            self._store_version(job, str(end.version), why, result)
            return
        with self._database.session() as session:
            # Whoever changes jobs along with something else holds their project first: in other
            # orders, two would wait for each other.
            session.get_one(Project, job.project_id, with_for_update=True)
            if result.get("shards"):
                self._start_shards(session, job, why, result)
                return
            self._jobs.finish(job, JobState.DONE, why, version=end.version, session=session)
            if result.get("stale") is not None:
                self._requests.stale_removal(session, job.project_id, result["stale"])

    def _store_version(self, job: Job, name: str, why: Reason, result: dict[str, Any]) -> None:
        """Enters a trained version, makes it live if it should be, and ends its training."""
        try:
            with self._database.session() as session:
                project = session.get_one(Project, job.project_id, with_for_update=True)
                # A rollback makes the row unreadable.
                key = project.key
                self._jobs.check(session, job)
                verdict = self._versions.record(
                    session,
                    job.project_id,
                    name,
                    result["card"],
                    Verdict(result["promote"], why),
                    parent=result["parent"],
                    revision=result["revision"],
                )
                self._jobs.finish(job, JobState.DONE, verdict.reason, version=name, session=session)
        except TakenOver:
            with self._database.reading() as session:
                stored = session.scalar(
                    select(ModelVersion.id).where(
                        ModelVersion.project_id == job.project_id, ModelVersion.name == name
                    )
                )
            if stored is None:
                # Nobody will ever ask for the artefact.
                self._artefacts.remove(key, name)
            raise
        try:
            self._versions.prune(job.project_id, self._settings.keep_versions)
        except (DatabaseError, OSError) as error:
            # The training is stored; the next one deletes what this one should have.
            _log.warning("project %s: old versions are deleted later: %s", key, error)

    def _start_shards(
        self, session: Session, job: Job, why: Reason, result: dict[str, Any]
    ) -> None:
        """Gives an auto-labelling's tasks to shards; the job goes on after the last."""
        self._jobs.wait_for_shards(session, job, why, result["checkpoint"])
        parts: Sequence[dict[str, Any]] = result["shards"]
        for part in parts:
            shard = Job(
                project_id=job.project_id,
                parent_id=job.id,
                kind=JobKind.AUTOLABEL_SHARD,
                state=JobState.QUEUED,
                trigger=job.trigger,
                reason=why,
                version=ShardPayload.model_validate(part).version,
                payload=part,
            )
            session.add(shard)
            session.flush()
            self._queue.put(session, shard)
