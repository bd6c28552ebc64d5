"""Finds the project that somebody means."""

from __future__ import annotations

from sqlalchemy import select

from ml_backend.label_studio.events import parse_project_key
from ml_backend.store.database import Database
from ml_backend.store.tables import Project


class ProjectNotFound(LookupError):
    """No project of that name is known here, or several are; the text says what to do."""


def find_project(database: Database, name: str) -> Project:
    """A known project by its key, or by its id where that is clear.

    Raises:
        InvalidEvent: it is neither a key nor an id.
        ProjectNotFound: there is none, or several.
    """
    wanted = parse_project_key(name)
    with database.reading() as session:
        same_id = session.scalars(
            select(Project).where(Project.label_studio_id == wanted.id).order_by(Project.id)
        ).all()
    # One of the same id and another creation is another Label Studio's.
    found = [p for p in same_id if p.key == wanted.key] if "." in name else same_id
    if not found:
        others = f" (but {', '.join(p.key for p in same_id)})" if same_id else ""
        raise ProjectNotFound(
            f"project {name} is not known here{others}: connect it with "
            f"`ml-backend connect --project {wanted.id}`"
        )
    if len(found) > 1:
        raise ProjectNotFound(
            f"several projects have the id {wanted.id}: say which, one of "
            + ", ".join(p.key for p in found)
        )
    return found[0]
