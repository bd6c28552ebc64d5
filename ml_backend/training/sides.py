"""Stores which tasks are learned from and which are held out."""

from __future__ import annotations

from typing import Any

from sqlalchemy import bindparam, update

from ml_backend.store.database import Database
from ml_backend.store.tables import Project, Task


def write_sides(database: Database, project_id: int, rows: list[dict[str, Any]]) -> None:
    """Stores the sides of tasks; a side that is known already stays.

    Args:
        database: where the tasks are.
        project_id: the project.
        rows: `task` (Label Studio's id), `mark` (fingerprint), `of` (clip) and `is` (side).
    """
    statement = (
        update(Task)
        .where(
            Task.project_id == project_id,
            Task.label_studio_id == bindparam("task"),
            Task.side.is_(None),
        )
        .values(fingerprint=bindparam("mark"), clip=bindparam("of"), side=bindparam("is"))
    )
    with database.session() as session:
        # Whoever changes tasks holds their project first: in other orders, two would wait for
        # each other.
        session.get_one(Project, project_id, with_for_update=True)
        session.connection().execute(statement, rows)
