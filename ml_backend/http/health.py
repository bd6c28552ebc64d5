"""`GET /health` and `GET /`: tells that the server is up.

Label Studio asks before each other request, so the answer needs no database and no model.
"""

from __future__ import annotations

from flask import Blueprint

blueprint = Blueprint("health", __name__)


@blueprint.get("/health")
@blueprint.get("/")
def health() -> dict[str, str]:
    """Answers that the server is up, in milliseconds, whatever the model is doing."""
    return {"status": "UP", "model_class": "ml_backend"}
