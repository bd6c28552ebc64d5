"""Reading back what the webhooks may have missed: they are sent once, and never again."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy import update

from ml_backend.label_studio.client import LabelStudioClient
from ml_backend.label_studio.events import read_annotation, read_task
from ml_backend.learning.ingest import Ingest, live_annotations
from ml_backend.store.database import Database
from ml_backend.store.tables import Project, now

_log = logging.getLogger(__name__)

OVERLAP = timedelta(minutes=5)
"""Read again this much of what was read before: clocks differ, transactions commit late."""


@dataclass(frozen=True, slots=True)
class Reconciled:
    """What reading back found.

    Attributes:
        tasks: tasks read.
        changed: annotations that were missing, old or gone.
        removed: annotated tasks that no longer exist.
    """

    tasks: int
    changed: int
    removed: int


def reconcile(
    project: Project, client: LabelStudioClient, database: Database, ingest: Ingest
) -> Reconciled:
    """Brings the store to what Label Studio holds of a project.

    Only tasks that changed since the last time are read, a page at a time; ids of the others only
    where the number of annotations says that some are gone.

    Raises:
        LabelStudioError: it could not be read; what was read by then is kept.
    """
    asked_at = now()
    info = client.project(project.label_studio_id)
    since = project.reconciled_at - OVERLAP if project.reconciled_at else None
    tasks = changed = 0
    for page in client.annotated_tasks(project.label_studio_id, changed_since=since):
        changed += ingest.read_back(
            project.id,
            [read_task(task) for task in page],
            [
                read_annotation({**annotation, "task": task["id"]})
                for task in page
                for annotation in task["annotations"]
            ],
            asked_at=asked_at,
        )
        tasks += len(page)
    removed = 0
    # Deletions leave no trace to be read: only where the numbers differ are all ids read.
    with database.reading() as session:
        known = live_annotations(session, project.id)
    if client.annotation_count(project.label_studio_id) != known:
        removed = ingest.keep_only_tasks(
            project.id, set(client.task_ids(project.label_studio_id)), asked_at=asked_at
        )
    with database.session() as session:
        session.execute(
            update(Project)
            .where(Project.id == project.id)
            .values(reconciled_at=asked_at, label_config=info.label_config, title=info.title)
        )
    if changed or removed:
        _log.info(
            "project %s: %d annotations and %d deleted tasks were read back",
            project.key,
            changed,
            removed,
        )
    return Reconciled(tasks, changed, removed)
