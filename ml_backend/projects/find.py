"""Finds the project that a key or an id names, and makes a new one known.

A full key, `"{id}.{creation as unix seconds}"`, identifies a project among several Label Studios;
an id alone does not, and means the one known project that has it. A project that was first named by
its id alone is stored under that id, and gets its full key once an event or request carries it.
"""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from ml_backend.label_studio.events import ProjectKey, parse_project_key
from ml_backend.store.database import Database
from ml_backend.store.tables import Project


class ProjectNotFound(LookupError):
    """Says that no known project has a name, or that several have; the text gives the remedy."""


def find_project(database: Database, name: str) -> Project:
    """Finds a known project by its key, or by its id where only one project has it.

    Raises:
        InvalidEvent: the name is neither a key nor an id.
        ProjectNotFound: no project is found, or several are.
    """
    wanted = parse_project_key(name)
    with database.reading() as session:
        found = matching_project(session, wanted)
        if found is not None:
            return found
        same_id = _same_id(session, wanted.id)
    others = f" (but {', '.join(p.key for p in same_id)})" if same_id else ""
    raise ProjectNotFound(
        f"project {name} is not known here{others}: connect it with "
        f"`ml-backend connect --project {wanted.id}`"
    )


def matching_project(session: Session, wanted: ProjectKey) -> Project | None:
    """Finds the known project that a key or an id means; None where there is none.

    Raises:
        ProjectNotFound: an id is given, and projects of several Label Studios have it.
    """
    same_id = _same_id(session, wanted.id)
    if "." in wanted.key:
        return next((p for p in same_id if p.key == wanted.key), None)
    # Earlier releases could store a project twice: by its id alone, and by its full key.
    candidates = [p for p in same_id if "." in p.key] or same_id
    if len(candidates) > 1:
        raise ProjectNotFound(
            f"several projects have the id {wanted.id}: say which, one of "
            + ", ".join(p.key for p in candidates)
        )
    return candidates[0] if candidates else None


def lock_project(session: Session, database: Database, wanted: ProjectKey) -> Project:
    """Finds or creates the row of a project, and locks it until the transaction ends.

    A row that was created by the id alone gets its full key here, once that is heard.

    Raises:
        ProjectNotFound: an id is given, and projects of several Label Studios have it.
    """
    row = matching_project(session, wanted)
    if row is None:
        row = _create(session, database, wanted)
    session.refresh(row, with_for_update=True)
    return row


def _create(session: Session, database: Database, wanted: ProjectKey) -> Project:
    # The row is always inserted under the id alone: of two transactions that store a new project at
    # once, the unique index lets the second wait for the first.
    bare = str(wanted.id)
    created = session.execute(
        database.insert(Project)
        .values(key=bare, label_studio_id=wanted.id)
        .on_conflict_do_nothing(index_elements=["key"])
        .returning(Project.id)
    ).scalar()
    row = session.scalar(select(Project).where(Project.key == bare).with_for_update())
    other = matching_project(session, wanted)
    if other is not None and other is not row:
        # Another transaction stored the project meanwhile.
        if created is not None and row is not None:
            session.delete(row)
        return other
    if row is None:
        # Another transaction gave the row a full key, of another Label Studio, meanwhile.
        return _create(session, database, wanted)
    if row.key != wanted.key and "." in wanted.key:
        row.key = wanted.key
        # With the id alone, the settings' Label Studio could not be asked whether it holds it.
        row.is_default = None
        session.flush()
    return row


def _same_id(session: Session, number: int) -> list[Project]:
    return list(
        session.scalars(
            select(Project).where(Project.label_studio_id == number).order_by(Project.id)
        )
    )
