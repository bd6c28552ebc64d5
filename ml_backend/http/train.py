"""`POST /train`: starts a training at once, as the Start Training button does."""

from __future__ import annotations

from typing import Any

from flask import Blueprint
from pydantic import BaseModel

from ml_backend.http.request import backend, find_project, read_body

blueprint = Blueprint("train", __name__)


class Train(BaseModel):
    """The body: the project, by key or by id."""

    project: str | int


@blueprint.post("/train")
def train() -> tuple[dict[str, Any], int]:
    """Answers the job and, in words, what became of the request."""
    project = find_project(str(read_body(Train).project))
    asked = backend().jobs.consider_training(project.id, trigger="command", forced=True)
    if asked.enqueue:
        backend().tasks.put("train", asked.job)
    status = 409 if asked.state == "refused" else 201
    return {"job": asked.job, "status": asked.state, "reason": asked.reason}, status
