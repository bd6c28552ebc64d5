"""Counts a project's annotations: what a training would learn from, and what has changed."""

from __future__ import annotations

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from ml_backend.store.tables import Annotation, Task


def annotated_tasks(session: Session, project_id: int) -> int:
    """Counts the tasks of a project that have an annotation to learn from."""
    deleted = select(Task.label_studio_id).where(
        Task.project_id == project_id, Task.deleted_at.is_not(None)
    )
    return (
        session.scalar(
            select(func.count(Annotation.task_id.distinct())).where(
                Annotation.project_id == project_id,
                Annotation.deleted_at.is_(None),
                Annotation.was_cancelled.is_(False),
                Annotation.task_id.not_in(deleted),
            )
        )
        or 0
    )


def live_annotations(session: Session, project_id: int) -> int:
    """Counts the annotations of a project, skipped and deleted ones left out."""
    return (
        session.scalar(
            select(func.count())
            .select_from(Annotation)
            .where(
                Annotation.project_id == project_id,
                Annotation.deleted_at.is_(None),
                Annotation.was_cancelled.is_(False),
            )
        )
        or 0
    )


def annotated_ids(session: Session, project_id: int) -> set[int]:
    """Reads Label Studio's ids of the tasks whose annotations `live_annotations` counts."""
    found = session.scalars(
        select(Annotation.task_id)
        .where(
            Annotation.project_id == project_id,
            Annotation.deleted_at.is_(None),
            Annotation.was_cancelled.is_(False),
        )
        .distinct()
    )
    return {number for number in found if number is not None}


def changes_since(session: Session, project_id: int, revision: int) -> int:
    """Counts the annotations that were created, changed or deleted after a revision."""
    return (
        session.scalar(
            select(func.count())
            .select_from(Annotation)
            .where(
                Annotation.project_id == project_id,
                Annotation.revision > revision,
                Annotation.was_cancelled.is_(False),
                Annotation.task_id.is_not(None),
            )
        )
        or 0
    )
