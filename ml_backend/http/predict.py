"""`POST /predict`: answers boxes for tasks, as far as these are done by the deadline."""

from __future__ import annotations

import logging
import sqlite3
import time
from typing import Any

from flask import Blueprint
from pydantic import BaseModel, Field, StrictInt
from sqlalchemy.exc import DatabaseError

from ml_backend.http.errors import BadRequest
from ml_backend.http.request import backend, find_project, predicting, read_body
from ml_backend.label_studio.events import parse_project_key
from ml_backend.label_studio.label_config import parse_label_config
from ml_backend.serving.counters import LEFT_OVER
from ml_backend.serving.predictions import Predicted
from ml_backend.store.database import is_outside
from ml_backend.store.tables import Project

blueprint = Blueprint("predict", __name__)
_log = logging.getLogger(__name__)

MOST_TASKS = 100_000
"""Tasks of a request at most: reading more takes longer than Label Studio waits."""


class TaskToPredict(BaseModel):
    """Holds the fields of a task that a prediction needs."""

    id: StrictInt | None = None
    data: dict[str, Any] = Field(default_factory=dict)


class Predict(BaseModel):
    """Holds the body, as Label Studio sends it."""

    tasks: list[TaskToPredict]
    project: str | None = None
    label_config: str | None = None


@blueprint.post("/predict")
def predict() -> dict[str, Any]:
    """Answers one entry for each task, in order; an empty list for a task without an answer.

    While as many requests as `predicts_at_a_time` are being worked on, a further one is answered
    at once with empty lists, and a job predicts its tasks, like the tasks past the deadline.
    """
    deadline = time.monotonic() + backend().settings.predict_deadline
    body = read_body(Predict)
    if not body.tasks:
        return {"results": []}
    if len(body.tasks) > MOST_TASKS:
        raise BadRequest(f"tasks: {len(body.tasks):,} at once: select at most {MOST_TASKS:,}")
    if body.project and body.label_config:
        key = parse_project_key(body.project)
        config = parse_label_config(body.label_config)
        project = backend().ingest.introduce(key.key, key.id, label_config=body.label_config)
    else:
        project = find_project(body.project or "")
        config = parse_label_config(body.label_config or project.label_config)
    tasks = [task.model_dump() for task in body.tasks]
    # A request that waited for others would keep a thread from `/health`, `/setup` and webhooks.
    if predicting().acquire(blocking=False):
        try:
            predicted = backend().serving.predict(project, config, tasks, deadline=deadline)
        finally:
            predicting().release()
        why = f"were not done within {backend().settings.predict_deadline:g} s"
    else:
        version = backend().models.version(project)
        predicted = Predicted([None] * len(tasks), [*range(len(tasks))], version)
        why = f"came while {backend().settings.predicts_at_a_time} requests were worked on"
    # Without an id there is no task to import a prediction for.
    left = [tasks[i] for i in predicted.unfinished if tasks[i]["id"] is not None]
    if left:
        _hand_over(project, left, f"{len(left)} of {len(tasks)} tasks {why}")
    return {
        "results": [result if result is not None else [] for result in predicted.results],
        "model_version": predicted.version,
    }


def _hand_over(project: Project, tasks: list[dict[str, Any]], what: str) -> None:
    """Asks for a job that predicts tasks.

    A failing database is only logged, so that the finished predictions can be answered.
    """
    try:
        job = backend().requests.deferred_predictions(project.id, tasks)
    except (DatabaseError, sqlite3.DatabaseError) as error:
        if not is_outside(error):
            raise
        _log.error("project %s: %s, and nobody finishes them: %s", project.key, what, error)
        return
    LEFT_OVER.inc(len(tasks))
    _log.warning("project %s: %s; job %d finishes them", project.key, what, job)
