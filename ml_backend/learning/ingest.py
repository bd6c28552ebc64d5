"""What Label Studio tells of, stored: the same event twice, late or out of order does no harm.

- An annotation is replaced only by a later state of itself (`updated_at`).
- A deletion is final: it stays as a tombstone, which no late event revives.
- Every change raises the project's revision; what a training saw is a revision.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import func, or_, select, update
from sqlalchemy.orm import Session

from ml_backend.label_studio.events import (
    AnnotationInfo,
    AnnotationsChanged,
    AnnotationsDeleted,
    Event,
    ProjectInfo,
    TaskInfo,
    TasksChanged,
    TasksDeleted,
)
from ml_backend.store.database import Database, in_chunks
from ml_backend.store.tables import Annotation, Project, Task, now


class UnknownProject(LookupError):
    """No project of that key has been heard of; the text says what to do."""


@dataclass(frozen=True, slots=True)
class Applied:
    """What an event did.

    Attributes:
        project_id: row of the project it concerns.
        changed: annotations that it created, changed or deleted.
    """

    project_id: int
    changed: int


class Ingest:
    """Writes what arrives into the store."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def apply(self, event: Event, project: ProjectInfo) -> Applied:
        """Stores an event whole, in one transaction, before anyone acknowledges it."""
        with self._database.session() as session:
            row = self._project(
                session, project.key, project.id, project.title, project.label_config
            )
            row.heard_at = now()
            changed = 0
            match event:
                case AnnotationsChanged(annotations=annotations, tasks=tasks):
                    self._tasks(session, row, tasks)
                    changed = self._annotations(session, row, annotations)
                case AnnotationsDeleted(ids=ids):
                    changed = self._bury_annotations(session, row, ids)
                case TasksChanged(tasks=tasks):
                    self._tasks(session, row, tasks)
                case TasksDeleted(ids=ids):
                    changed = self._bury_tasks(session, row, ids)
            self._count(row, changed)
            return Applied(row.id, changed)

    def introduce(
        self,
        key: str,
        label_studio_id: int,
        *,
        label_config: str,
        url: str | None = None,
        token: str | None = None,
    ) -> Project:
        """Makes a project known, or refreshes what is known of it (`/setup`, `/predict`).

        Writes only where something is new: `/setup` comes with every task that is opened.
        """
        with self._database.reading() as session:
            row = session.scalar(select(Project).where(Project.key == key))
            if row is not None and (
                row.label_config == label_config
                and (url is None or row.url == url)
                and (token is None or row.token == token)
            ):
                return row
        with self._database.session() as session:
            row = self._project(session, key, label_studio_id, None, label_config)
            if url is not None:
                if row.url != url:
                    row.is_default = None
                row.url = url
            if token is not None:
                row.token = token
            return row

    def read_back(
        self,
        project_id: int,
        tasks: Sequence[TaskInfo],
        annotations: Sequence[AnnotationInfo],
        *,
        asked_at: datetime,
    ) -> int:
        """Stores whole tasks as Label Studio's API showed them; answers how many changed.

        An annotation of these tasks that the API no longer shows is gone, unless it arrived
        after `asked_at`, when the page was asked for.
        """
        with self._database.session() as session:
            row = session.get_one(Project, project_id, with_for_update=True)
            self._tasks(session, row, tasks)
            changed = self._annotations(session, row, annotations)
            seen = {a.id for a in annotations}
            gone: list[int] = []
            for chunk in in_chunks({"id": t.id} for t in tasks):
                gone += [
                    known
                    for known in session.scalars(
                        select(Annotation.label_studio_id).where(
                            Annotation.project_id == project_id,
                            Annotation.task_id.in_([c["id"] for c in chunk]),
                            Annotation.deleted_at.is_(None),
                            Annotation.received_at < asked_at,
                        )
                    )
                    if known not in seen
                ]
            changed += self._bury_annotations(session, row, gone)
            self._count(row, changed)
            return changed

    def keep_only_tasks(self, project_id: int, ids: set[int], *, asked_at: datetime) -> int:
        """Buries the annotated tasks that Label Studio no longer has; answers how many."""
        with self._database.session() as session:
            row = session.get_one(Project, project_id, with_for_update=True)
            known = session.scalars(
                select(Annotation.task_id)
                .where(
                    Annotation.project_id == project_id,
                    Annotation.deleted_at.is_(None),
                    Annotation.received_at < asked_at,
                    Annotation.task_id.is_not(None),
                )
                .distinct()
            )
            gone = [task for task in known if task is not None and task not in ids]
            self._count(row, self._bury_tasks(session, row, gone))
            return len(gone)

    def _project(
        self,
        session: Session,
        key: str,
        label_studio_id: int,
        title: str | None,
        label_config: str | None,
    ) -> Project:
        session.execute(
            self._database.insert(Project)
            .values(key=key, label_studio_id=label_studio_id)
            .on_conflict_do_nothing(index_elements=["key"])
        )
        row = session.scalars(select(Project).where(Project.key == key).with_for_update()).one()
        if title:
            row.title = title
        if label_config:
            row.label_config = label_config
        return row

    def _tasks(self, session: Session, project: Project, tasks: Iterable[TaskInfo]) -> None:
        rows = [
            {
                "project_id": project.id,
                "label_studio_id": task.id,
                "data": task.data,
                "updated_at": task.updated_at,
            }
            for task in {t.id: t for t in tasks}.values()
        ]
        for chunk in in_chunks(rows):
            statement = self._database.insert(Task).values(chunk)
            new = statement.excluded
            session.execute(
                statement.on_conflict_do_update(
                    index_elements=["project_id", "label_studio_id"],
                    set_={"data": new.data, "updated_at": new.updated_at},
                    where=or_(Task.updated_at.is_(None), new.updated_at > Task.updated_at),
                )
            )

    def _annotations(
        self, session: Session, project: Project, annotations: Iterable[AnnotationInfo]
    ) -> int:
        latest: dict[int, AnnotationInfo] = {}
        for annotation in annotations:
            before = latest.get(annotation.id)
            if before is None or annotation.updated_at >= before.updated_at:
                latest[annotation.id] = annotation
        rows: list[dict[str, Any]] = [
            {
                "project_id": project.id,
                "label_studio_id": a.id,
                "task_id": a.task_id,
                "result": a.result,
                "was_cancelled": a.was_cancelled,
                "ground_truth": a.ground_truth,
                "lead_time": a.lead_time,
                "parent_prediction": a.parent_prediction,
                "completed_by": a.completed_by,
                "created_at": a.created_at,
                "updated_at": a.updated_at,
                "received_at": now(),
                "revision": project.revision + 1,
            }
            for a in latest.values()
        ]
        changed = 0
        for chunk in in_chunks(rows):
            statement = self._database.insert(Annotation).values(chunk)
            new = statement.excluded
            keys = set(chunk[0]) - {"project_id", "label_studio_id", "created_at"}
            outcome = session.execute(
                statement.on_conflict_do_update(
                    index_elements=["project_id", "label_studio_id"],
                    set_={key: new[key] for key in keys},
                    where=Annotation.deleted_at.is_(None)
                    & or_(
                        Annotation.updated_at.is_(None),
                        new.updated_at > Annotation.updated_at,
                    ),
                ).returning(Annotation.id)
            )
            changed += len(outcome.all())
        return changed

    def _bury_annotations(self, session: Session, project: Project, ids: Iterable[int]) -> int:
        rows = [
            {
                "project_id": project.id,
                "label_studio_id": number,
                "result": [],
                "received_at": now(),
                "deleted_at": now(),
                "revision": project.revision + 1,
            }
            for number in set(ids)
        ]
        changed = 0
        for chunk in in_chunks(rows):
            statement = self._database.insert(Annotation).values(chunk)
            new = statement.excluded
            outcome = session.execute(
                statement.on_conflict_do_update(
                    index_elements=["project_id", "label_studio_id"],
                    set_={"deleted_at": new.deleted_at, "revision": new.revision},
                    where=Annotation.deleted_at.is_(None),
                ).returning(Annotation.task_id)
            )
            # A tombstone without a task was never learned from: nothing changes by it.
            changed += sum(task is not None for task in outcome.scalars())
        return changed

    def _bury_tasks(self, session: Session, project: Project, ids: Iterable[int]) -> int:
        changed = 0
        for chunk in in_chunks({"id": number} for number in set(ids)):
            numbers = [c["id"] for c in chunk]
            rows = [
                {
                    "project_id": project.id,
                    "label_studio_id": number,
                    "data": {},
                    "deleted_at": now(),
                }
                for number in numbers
            ]
            statement = self._database.insert(Task).values(rows)
            session.execute(
                statement.on_conflict_do_update(
                    index_elements=["project_id", "label_studio_id"],
                    set_={"deleted_at": statement.excluded.deleted_at},
                    where=Task.deleted_at.is_(None),
                )
            )
            outcome = session.execute(
                update(Annotation)
                .where(
                    Annotation.project_id == project.id,
                    Annotation.task_id.in_(numbers),
                    Annotation.deleted_at.is_(None),
                )
                .values(deleted_at=now(), revision=project.revision + 1)
                .returning(Annotation.id)
            )
            changed += len(outcome.all())
        return changed

    @staticmethod
    def _count(project: Project, changed: int) -> None:
        if changed:
            project.revision += 1
            project.changed_at = now()


def annotated_tasks(session: Session, project_id: int) -> int:
    """How many tasks of a project have an annotation to learn from."""
    return (
        session.scalar(
            select(func.count(Annotation.task_id.distinct()))
            .join(
                Task,
                (Task.project_id == Annotation.project_id)
                & (Task.label_studio_id == Annotation.task_id),
            )
            .where(
                Annotation.project_id == project_id,
                Annotation.deleted_at.is_(None),
                Annotation.was_cancelled.is_(False),
                Task.deleted_at.is_(None),
            )
        )
        or 0
    )


def live_annotations(session: Session, project_id: int) -> int:
    """How many annotations a project has, skipped and deleted ones left out."""
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


def changes_since(session: Session, project_id: int, revision: int) -> int:
    """How many annotations were created, changed or deleted after a revision."""
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
