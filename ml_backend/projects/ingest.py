"""Stores events of Label Studio, which may arrive twice, late or out of order.

- An annotation is replaced only by a later state of itself (`updated_at`).
- A deletion is final: it stays as a tombstone, which no late event revives. Only Label Studio's API
  does, where it shows what was deleted before it was asked.
- Title and label config come from the newest event about the project itself, or from `/setup`,
  `/predict` or the API; other events carry them as well, but in no promised order.
- Every change raises the project's revision; a training stores the revision that it read.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import false, or_, select, update
from sqlalchemy.orm import Session

from ml_backend.label_studio.events import (
    AnnotationInfo,
    AnnotationsChanged,
    AnnotationsDeleted,
    Event,
    ProjectChanged,
    ProjectInfo,
    ProjectKey,
    TaskInfo,
    TasksChanged,
    TasksDeleted,
)
from ml_backend.projects.counts import live_annotations
from ml_backend.projects.find import lock_project, matching_project
from ml_backend.store.database import Database, in_chunks
from ml_backend.store.tables import Annotation, Project, Task, now


@dataclass(frozen=True, slots=True)
class Applied:
    """Holds the outcome of an event.

    Attributes:
        project_id: row of the project it concerns.
        changed: annotations that it created, changed or deleted.
    """

    project_id: int
    changed: int


class Ingest:
    """Writes events, projects and read-back tasks into the database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def apply(self, event: Event, project: ProjectInfo) -> Applied:
        """Stores an event whole, in one transaction, before anyone acknowledges it."""
        with self._database.session() as session:
            row = lock_project(session, self._database, ProjectKey(project.key, project.id))
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
            _notice_missing(session, row, event)
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
        """Stores a project, or updates the stored one (`/setup`, `/predict`).

        Writes only where a value is new, since `/setup` comes with every task that is opened.

        Args:
            key: `"{id}.{creation as unix seconds}"`, or the id alone.
            label_studio_id: Label Studio's id.
            label_config: XML; empty if unknown.
            url: the address that its Label Studio names as its own.
            token: a token for that address.

        Raises:
            ProjectNotFound: the key is an id alone, and projects of several Label Studios have it.
        """
        wanted = ProjectKey(key, label_studio_id)
        with self._database.reading() as session:
            row = matching_project(session, wanted)
            if row is not None and (
                row.label_config == label_config
                and (url is None or row.url == url)
                and (token is None or row.token == token)
            ):
                return row
        with self._database.session() as session:
            row = lock_project(session, self._database, wanted)
            if label_config and row.label_config != label_config:
                row.label_config = label_config
                row.described_at = now()
            if url is not None:
                if row.url != url:
                    # The token belongs to the former address and must not be sent to another.
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

        Tasks and annotations that the API shows exist, even where they are stored as deleted; an
        annotation of these tasks that it does not show is deleted. Events that arrived after the
        request to the API are kept.

        Args:
            project_id: the project.
            tasks: the tasks.
            annotations: all their annotations that can be read.
            asked_at: when the API was asked, or earlier.
            unreadable: ids of their other annotations, which stay as they are stored.
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
        """Marks tasks that Label Studio no longer has as deleted; answers how many annotations of
        theirs were marked with them.
        """
        with self._database.session() as session:
            row = session.get_one(Project, project_id, with_for_update=True)
            changed = self._bury_tasks(session, row, ids)
            self._count(row, changed)
            return changed

    def end_reading(self, project_id: int, project: ProjectInfo, *, asked_at: datetime) -> None:
        """Notes that a project was read back; stores title and label config of the API."""
        with self._database.session() as session:
            row = session.get_one(Project, project_id, with_for_update=True)
            row.reconciled_at = asked_at
            if row.unread_since is not None and row.unread_since <= asked_at:
                row.unread_since = None
            _describe(row, project, at=asked_at)

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
                        # Label Studio's clock may have been ahead: whatever its dates, the state
                        # that it shows is later than one that arrived before the request.
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
            # A tombstone without a task is of an annotation that was never stored: no change.
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
    """Stores title and label config of a project, unless newer ones are stored.

    Args:
        row: the stored project.
        project: the title and the label config.
        at: when Label Studio gave them.
    """
    if row.described_at is not None and at <= row.described_at:
        return
    row.title = project.title or row.title
    row.label_config = project.label_config or row.label_config
    row.described_at = at


def _notice_missing(session: Session, row: Project, event: Event) -> None:
    """Marks a project for reading back where Label Studio reports another number of annotations.

    An import with annotations sends `TASKS_CREATED` alone, and a project may have been annotated
    before it was connected. Numbers in events of single annotations are compared only until the
    project is marked or read back: a count takes a millisecond while other webhooks wait to write,
    and numbers differ while other events are on the way.
    """
    told = event.project.annotations
    single = isinstance(event, AnnotationsChanged | AnnotationsDeleted)
    settled = row.reconciled_at is not None or row.unread_since is not None
    if told is None or (single and settled):
        return
    if told != live_annotations(session, row.id):
        row.unread_since = now()


def _revive(
    session: Session,
    project: Project,
    table: type[Task] | type[Annotation],
    ids: Iterable[int],
    asked_at: datetime,
) -> None:
    """Removes deletion marks that were set before a moment; the next state replaces the rows."""
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
