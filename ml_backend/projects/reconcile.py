"""Reads back changes from Label Studio that no webhook reported; a webhook is sent only once."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from ml_backend.label_studio.client import LabelStudioClient
from ml_backend.label_studio.events import read_annotation, read_task, readable
from ml_backend.projects.counts import annotated_ids, live_annotations
from ml_backend.projects.ingest import Ingest
from ml_backend.store.database import Database, in_chunks
from ml_backend.store.tables import Project, now

_log = logging.getLogger(__name__)

OVERLAP = timedelta(minutes=5)
"""Reads overlap by this much, since clocks differ and transactions commit late."""
_AT_ONCE = 100
"""Tasks that are read by their ids, which an address has room for, or stored, in one go."""


@dataclass(frozen=True, slots=True)
class Reconciled:
    """Holds the outcome of reading back.

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
    """Stores all changes of a project that Label Studio holds.

    Only tasks that changed since the last time are read, a page at a time; ids of the others only
    where the number of annotations says that some are missing, or gone. What cannot be read is
    logged and passed over.

    Raises:
        LabelStudioError: Label Studio could not be read; what was read by then is kept.
    """
    asked_at = now()
    number = project.label_studio_id
    info = client.project(number)
    since = project.reconciled_at - OVERLAP if project.reconciled_at else None
    tasks = changed = removed = 0
    for page in client.annotated_tasks(number, changed_since=since):
        changed += _read_back(project.id, page, ingest, asked_at)
        tasks += len(page)
    # The API does not list deletions: all ids are read where the numbers differ.
    with database.reading() as session:
        known = live_annotations(session, project.id)
    if client.annotation_count(number) != known:
        listed = set(client.task_ids(number))
        with database.reading() as session:
            doubtful = sorted(listed ^ annotated_ids(session, project.id))
        for asked in in_chunks(doubtful, _AT_ONCE):
            page = client.tasks(number, asked)
            changed += _read_back(project.id, page, ingest, asked_at)
            tasks += len(page)
            # A task that lost its annotations is not listed, but exists.
            gone = set(asked) - {int(task["id"]) for task in page}
            ingest.remove_tasks(project.id, gone)
            removed += len(gone)
    ingest.end_reading(project.id, info, asked_at=asked_at)
    if changed or removed:
        _log.info(
            "project %s: %d annotations and %d deleted tasks were read back",
            project.key,
            changed,
            removed,
        )
    return Reconciled(tasks, changed, removed)


def _read_back(
    project_id: int, page: Sequence[dict[str, Any]], ingest: Ingest, asked_at: datetime
) -> int:
    # A few tasks at a time, so that webhooks can be stored in between.
    return sum(
        _read_back_at_once(project_id, few, ingest, asked_at) for few in in_chunks(page, _AT_ONCE)
    )


def _read_back_at_once(
    project_id: int, page: Sequence[dict[str, Any]], ingest: Ingest, asked_at: datetime
) -> int:
    shown = [
        {**annotation, "task": task["id"]} for task in page for annotation in task["annotations"]
    ]
    annotations = readable(read_annotation, shown)
    return ingest.read_back(
        project_id,
        readable(read_task, page),
        annotations,
        asked_at=asked_at,
        unreadable={a["id"] for a in shown} - {a.id for a in annotations},
    )
