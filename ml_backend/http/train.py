"""`POST /train`: starts a training at once, as the Start Training button does."""

from __future__ import annotations

from typing import Any

from flask import Blueprint
from pydantic import BaseModel

from ml_backend.http.request import backend, find_project, read_body
from ml_backend.store.states import JobState, Trigger
from ml_backend.wording import told

blueprint = Blueprint("train", __name__)


class Train(BaseModel):
    """Holds the body: the project, by key or by id."""

    project: str | int


@blueprint.post("/train")
def train() -> tuple[dict[str, Any], int]:
    """Answers the job, its state and the reason; 409 where the training is refused."""
    project = find_project(str(read_body(Train).project))
    asked = backend().requests.training(project.id, trigger=Trigger.COMMAND, forced=True)
    status = 409 if asked.state == JobState.REFUSED else 201
    return {"job": asked.job, "status": asked.state, **told("reason", asked.reason)}, status
