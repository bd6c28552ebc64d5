"""What Label Studio tells of, stored: the same event twice, late or out of order does no harm.

- An annotation is replaced only by a later state of itself (`updated_at`).
- A deletion is final: it stays as a tombstone, which no late event revives. Only Label Studio's API
  does, where it shows what was deleted before it was asked.
- Title and label config are what the newest event about the project itself says, or `/setup`,
  `/predict` or the API; other events carry them as well, in no order that is promised.
- Every change raises the project's revision; what a training saw is a revision.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import false, func, or_, select, update
from sqlalchemy.orm import Session

from ml_backend.label_studio.events import (
    AnnotationInfo,
    AnnotationsChanged,
    AnnotationsDeleted,
    Event,
    ProjectChanged,
    ProjectInfo,
    TaskInfo,
    TasksChanged,
    TasksDeleted,
)
from ml_backend.store.database import Database, in_chunks
from ml_backend.store.tables import Annotation, Project, Task, now


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
            row = self._project(session, project.key, project.id)
            row.title = row.title or project.title
            row.label_config = row.label_config or project.label_config
            row.heard_at = now()
            changed = 0
            match event:
                case ProjectChanged():
                    _describe(row, project, at=project.updated_at or now())
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
            row = self._project(session, key, label_studio_id)
            if label_config and row.label_config != label_config:
                row.label_config = label_config
                row.described_at = now()
            if url is not None:
                if row.url != url:
                    # The token is good where it came from, and goes nowhere else.
                    row.is_default = row.token = None
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
        unreadable: Collection[int] = (),
    ) -> int:
        """Stores whole tasks as Label Studio's API showed them; answers how many changed.

        What the API shows is there, even where it was taken for deleted; an annotation of these
        tasks that it does not show is gone. What arrived after it was asked stands.

        Args:
            project_id: the project.
            tasks: the tasks.
            annotations: all of theirs that can be read.
            asked_at: when the API was asked, or earlier.
            unreadable: ids of their other annotations: those stay as they are known.
        """
        with self._database.session() as session:
            row = session.get_one(Project, project_id, with_for_update=True)
            _revive(session, row, Task, (t.id for t in tasks), asked_at)
            _revive(session, row, Annotation, (a.id for a in annotations), asked_at)
            self._tasks(session, row, tasks)
            changed = self._annotations(session, row, annotations, asked_at)
            seen = {a.id for a in annotations}.union(unreadable)
            gone: list[int] = []
            for numbers in in_chunks(t.id for t in tasks):
                gone += [
                    known
                    for known in session.scalars(
                        select(Annotation.label_studio_id).where(
                            Annotation.project_id == project_id,
                            Annotation.task_id.in_(numbers),
                            Annotation.deleted_at.is_(None),
                            Annotation.received_at < asked_at,
                        )
                    )
                    if known not in seen
                ]
            changed += self._bury_annotations(session, row, gone)
            self._count(row, changed)
            return changed

    def remove_tasks(self, project_id: int, ids: Collection[int]) -> int:
        """Buries tasks that Label Studio no longer has; answers how many annotations went along."""
        with self._database.session() as session:
            row = session.get_one(Project, project_id, with_for_update=True)
            changed = self._bury_tasks(session, row, ids)
            self._count(row, changed)
            return changed

    def end_reading(self, project_id: int, project: ProjectInfo, *, asked_at: datetime) -> None:
        """Notes that all was read back, and what the API said of the project itself."""
        with self._database.session() as session:
            row = session.get_one(Project, project_id, with_for_update=True)
            row.reconciled_at = asked_at
            _describe(row, project, at=asked_at)

    def _project(self, session: Session, key: str, label_studio_id: int) -> Project:
        session.execute(
            self._database.insert(Project)
            .values(key=key, label_studio_id=label_studio_id)
            .on_conflict_do_nothing(index_elements=["key"])
        )
        return session.scalars(select(Project).where(Project.key == key).with_for_update()).one()

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
            statement = self._database.insert(Task)
            new = statement.excluded
            session.execute(
                statement.on_conflict_do_update(
                    index_elements=["project_id", "label_studio_id"],
                    set_={"data": new.data, "updated_at": new.updated_at},
                    where=or_(Task.updated_at.is_(None), new.updated_at > Task.updated_at),
                ),
                chunk,
            )

    def _annotations(
        self,
        session: Session,
        project: Project,
        annotations: Iterable[AnnotationInfo],
        asked_at: datetime | None = None,
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
            statement = self._database.insert(Annotation)
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
                        # Label Studio's clock was ahead once: what it shows now is later, all the
                        # same, than what had arrived before it was asked.
                        (Annotation.received_at < asked_at)
                        & (new.updated_at != Annotation.updated_at)
                        if asked_at is not None
                        else false(),
                    ),
                ).returning(Annotation.id),
                chunk,
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
            statement = self._database.insert(Annotation)
            new = statement.excluded
            outcome = session.execute(
                statement.on_conflict_do_update(
                    index_elements=["project_id", "label_studio_id"],
                    set_={"deleted_at": new.deleted_at, "revision": new.revision},
                    where=Annotation.deleted_at.is_(None),
                ).returning(Annotation.task_id),
                chunk,
            )
            # A tombstone without a task was never learned from: nothing changes by it.
            changed += sum(task is not None for task in outcome.scalars())
        return changed

    def _bury_tasks(self, session: Session, project: Project, ids: Iterable[int]) -> int:
        changed = 0
        for numbers in in_chunks(set(ids)):
            rows = [
                {
                    "project_id": project.id,
                    "label_studio_id": number,
                    "data": {},
                    "deleted_at": now(),
                }
                for number in numbers
            ]
            statement = self._database.insert(Task)
            session.execute(
                statement.on_conflict_do_update(
                    index_elements=["project_id", "label_studio_id"],
                    set_={"deleted_at": statement.excluded.deleted_at},
                    where=Task.deleted_at.is_(None),
                ),
                rows,
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


def _describe(row: Project, project: ProjectInfo, *, at: datetime) -> None:
    """Takes over what a project was called, and its label config, unless something newer is known.

    Args:
        row: where they are kept.
        project: what they were.
        at: when they were so.
    """
    if row.described_at is not None and at <= row.described_at:
        return
    row.title = project.title or row.title
    row.label_config = project.label_config or row.label_config
    row.described_at = at


def _revive(
    session: Session,
    project: Project,
    table: type[Task] | type[Annotation],
    ids: Iterable[int],
    asked_at: datetime,
) -> None:
    """Takes back what was buried before a moment; whatever state is stored next is taken."""
    for numbers in in_chunks(ids):
        session.execute(
            update(table)
            .where(
                table.project_id == project.id,
                table.label_studio_id.in_(numbers),
                table.deleted_at < asked_at,
            )
            .values(deleted_at=None, updated_at=None)
        )


def annotated_tasks(session: Session, project_id: int) -> int:
    """How many tasks of a project have an annotation to learn from."""
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


def annotated_ids(session: Session, project_id: int) -> set[int]:
    """Label Studio's ids of the tasks that `live_annotations` counts annotations of."""
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
