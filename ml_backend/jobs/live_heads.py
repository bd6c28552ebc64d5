"""Asking for live heads: one follows each annotation, until a trained version is live."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from ml_backend.jobs.jobs import Asked
from ml_backend.jobs.queue import Queue
from ml_backend.projects.counts import annotated_tasks
from ml_backend.reasons import Code, reason
from ml_backend.settings import Settings
from ml_backend.store.database import Database
from ml_backend.store.states import ACTIVE, JobKind, JobState, Trigger
from ml_backend.store.tables import Job, ModelVersion, Project, is_live_head


class LiveHeadRequests:
    """Asks for live heads.

    Args:
        database: projects and their jobs.
        queue: receives the jobs.
        settings: from how many annotated tasks on.
    """

    def __init__(self, database: Database, queue: Queue, settings: Settings) -> None:
        self._database = database
        self._queue = queue
        self._settings = settings

    def consider(self, project_id: int) -> Asked | None:
        """Asks for a live head where annotations have changed since the last one began.

        Returns:
            The job; None where there is nothing to do.
        """
        if not self._settings.makes_live_heads:
            return None
        with self._database.reading() as session:
            project = session.get_one(Project, project_id)
            # Counting takes longer, and is not needed once a trained version is live.
            if not _is_wanted(session, project):
                return None
            annotated = annotated_tasks(session, project_id)
            if annotated < self._settings.live_min:
                return None
        with self._database.session() as session:
            # The row's lock: two workers must not both create the job.
            project = session.get_one(Project, project_id, with_for_update=True)
            if not _is_wanted(session, project):
                return None
            job = Job(
                project_id=project_id,
                kind=JobKind.LIVE_HEAD,
                state=JobState.QUEUED,
                trigger=Trigger.WEBHOOK,
                reason=reason(Code.ANNOTATIONS_CHANGED, annotated=annotated),
            )
            session.add(job)
            session.flush()
            self._queue.put(session, job)
            return Asked.of(job)


def trained_version_is_live(session: Session, project: Project) -> bool:
    """Tells whether the live version was trained, and is no live head."""
    if project.live_version is None:
        return False
    card = session.scalar(
        select(ModelVersion.card).where(
            ModelVersion.project_id == project.id, ModelVersion.name == project.live_version
        )
    )
    return not is_live_head(card or {})


def _is_wanted(session: Session, project: Project) -> bool:
    if project.changed_at is None or trained_version_is_live(session, project):
        return False
    newest = session.scalar(
        select(Job)
        .where(Job.project_id == project.id, Job.kind == JobKind.LIVE_HEAD)
        .order_by(Job.id.desc())
        .limit(1)
    )
    if newest is None:
        return True
    if newest.state in ACTIVE:
        return False
    return newest.started_at is None or newest.started_at < project.changed_at
