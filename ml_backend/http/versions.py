"""`GET /versions`: lists all model versions that are kept, the live ones first."""

from __future__ import annotations

from flask import Blueprint
from sqlalchemy import select

from ml_backend.http.request import backend
from ml_backend.store.tables import UNTRAINED, ModelVersion

blueprint = Blueprint("versions", __name__)


@blueprint.get("/versions")
def versions() -> dict[str, list[str]]:
    """Answers the versions of all projects, since Label Studio does not say for which it asks."""
    with backend().database.reading() as session:
        rows = session.execute(
            select(ModelVersion.name, ModelVersion.state)
            .where(ModelVersion.state != "pruned")
            .order_by(ModelVersion.id.desc())
        ).all()
    live = [name for name, state in rows if state == "live"]
    others = [name for name, state in rows if state != "live"]
    return {"versions": live + others or [UNTRAINED]}
