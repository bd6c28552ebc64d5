"""Stores which tasks are learned from and which are held out."""

from __future__ import annotations

from typing import Any

from sqlalchemy import bindparam, update
from sqlalchemy.orm import Session

from ml_backend.store.tables import Task


def write_sides(session: Session, project_id: int, rows: list[dict[str, Any]]) -> None:
    """Stores the sides of tasks; a side that is known already stays.

    Args:
        session: the transaction; it holds the project, as whoever changes tasks does first: in
            other orders, two transactions would wait for each other.
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
    session.connection().execute(statement, rows)
