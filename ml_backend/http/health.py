"""`GET /health` and `GET /`: is it up? Asked before everything else, so it touches nothing."""

from __future__ import annotations

from flask import Blueprint

blueprint = Blueprint("health", __name__)


@blueprint.get("/health")
@blueprint.get("/")
def health() -> dict[str, str]:
    """Answers that the server is up, in milliseconds, whatever the model is doing."""
    return {"status": "UP", "model_class": "ml_backend"}
