"""`GET /openapi.json`: describes requests and answers of this server, as OpenAPI 3.1.

The schemas of bodies are made of the models that check them. An error is one sentence in `error`,
and the same sentence, shortened, as the reason phrase.
"""

from __future__ import annotations

import functools
from http import HTTPStatus
from typing import Any

from flask import Blueprint
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

import ml_backend
from ml_backend.http.job_status import JobStatus
from ml_backend.http.predict import Predict
from ml_backend.http.setup import Setup
from ml_backend.http.train import Train
from ml_backend.http.validate import Validate
from ml_backend.projects.connect import SECRET_HEADER
from ml_backend.reasons import Code
from ml_backend.store.states import JobKind, JobState

blueprint = Blueprint("openapi", __name__)

Schema = dict[str, Any]

_BODIES = (Setup, Predict, Validate, JobStatus, Train)
_TEXT: Schema = {"type": "string"}
_COUNT: Schema = {"type": "integer", "minimum": 0}


def _object(optional: tuple[str, ...] = (), **properties: Schema) -> Schema:
    """Makes the schema of an object that has these properties and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": [name for name in properties if name not in optional],
        "additionalProperties": False,
    }


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _one_or_more(content: Schema) -> Schema:
    return {"anyOf": [content, _list(content)]}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


_ID = {"type": "integer", "minimum": 0, "maximum": 2**63 - 1}
_MOMENT = {"type": "string", "format": "date-time"}
_UP = _object(status={"const": "UP"}, model_class=_TEXT)
_DONE = _object(status={"const": "ok"}, detail=_TEXT)
_REASON: dict[str, Schema] = {
    "reason": {**_TEXT, "description": "The reason in words, for people."},
    "reason_code": {
        **_TEXT,
        "description": "The same reason for programs: the code does not change with the words.",
        "examples": [str(Code.ASKED_FOR), str(Code.QUIET_TIME)],
    },
    "reason_values": {
        "type": "object",
        "description": "The values that the words mention; a value may be a reason itself, with "
        "`code` and `values`.",
    },
}
_ASKED = _object(optional=(), job=_COUNT, status={"enum": list(map(str, JobState))}, **_REASON)
_SCHEMAS: dict[str, Schema] = {
    "Error": _object(error=_TEXT),
    "Prediction": _object(
        result=_list({"type": "object"}),
        score={"type": "number", "minimum": 0, "maximum": 1},
        model_version=_TEXT,
    ),
    "Job": _object(
        optional=(),
        job=_COUNT,
        kind={"enum": list(map(str, JobKind))},
        job_status={"enum": list(map(str, JobState))},
        **_REASON,
        progress={"type": "number", "minimum": 0, "maximum": 1},
        created_at=_MOMENT,
        finished_at={"anyOf": [_MOMENT, {"type": "null"}]},
        version={"type": ["string", "null"]},
    ),
    "Identified": {"type": "object", "properties": {"id": _ID}, "required": ["id"]},
    "Task": {
        "type": "object",
        "properties": {"id": _ID, "data": {"type": "object"}, "updated_at": _MOMENT},
        "required": ["id", "data", "updated_at"],
    },
    "Annotation": {
        "type": "object",
        "properties": {
            "id": _ID,
            "task": _ID,
            "result": _list({"type": "object"}),
            "was_cancelled": {"type": "boolean"},
            "ground_truth": {"type": "boolean"},
            "lead_time": {"type": ["number", "null"]},
            "parent_prediction": {"type": ["integer", "null"]},
            "created_at": _MOMENT,
            "updated_at": _MOMENT,
        },
        "required": ["id", "task", "result", "created_at", "updated_at"],
    },
    "Webhook": {
        "type": "object",
        "properties": {
            "action": {
                "type": "string",
                "examples": [
                    *("ANNOTATION_CREATED", "ANNOTATION_UPDATED", "ANNOTATIONS_CREATED"),
                    *("ANNOTATIONS_DELETED", "TASKS_CREATED", "TASKS_DELETED"),
                    *("PROJECT_UPDATED", "START_TRAINING"),
                ],
            },
            "project": {
                "type": "object",
                "properties": {
                    "id": _ID,
                    "created_at": _MOMENT,
                    "updated_at": _MOMENT,
                    "title": _TEXT,
                    "label_config": _TEXT,
                },
                "required": ["id", "created_at"],
            },
            "annotation": _one_or_more(_ref("Annotation")),
            "task": _one_or_more(_ref("Task")),
            "annotations": _list(_ref("Identified")),
            "tasks": _list(_ref("Identified")),
        },
        "required": ["action"],
    },
}


def _answer(schema: Schema, kind: str = "application/json", *, of: int = 200) -> Schema:
    return {"description": HTTPStatus(of).phrase, "content": {kind: {"schema": schema}}}


def _operation(
    summary: str, answers: dict[int, Schema], body: type[BaseModel] | str | None = None
) -> Schema:
    """Describes an operation, with the errors that it may answer.

    Args:
        summary: one line.
        answers: schema by status.
        body: the model that checks the body, or the name of a schema above.
    """
    errors = [400, 403, 413] if body is not None else []
    if summary != _HEALTH:
        errors += [401, 503]
    told = {
        **{str(status): _answer(schema, of=status) for status, schema in answers.items()},
        **{str(status): _answer(_ref("Error"), of=status) for status in errors},
    }
    operation: Schema = {"summary": summary, "responses": told}
    if summary == _HEALTH:
        operation["security"] = []
    if body is not None:
        name = body if isinstance(body, str) else body.__name__
        operation["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": _ref(name)}},
        }
    return operation


_HEALTH = "Is it up?"


@functools.cache
def description() -> Schema:
    """Makes the whole description."""
    _, bodies = models_json_schema(
        [(model, "validation") for model in _BODIES], ref_template="#/components/schemas/{model}"
    )
    prediction = {"anyOf": [_ref("Prediction"), {"type": "array", "maxItems": 0}]}
    webhook = {
        "anyOf": [
            _object(status={"const": "stored"}, changed=_COUNT),
            _object(status={"const": "ignored"}, action=_TEXT),
            _ASKED,
        ]
    }
    metrics = _operation("Counters, for Prometheus", {})
    metrics["responses"]["200"] = _answer(_TEXT, "text/plain")
    return {
        "openapi": "3.1.0",
        "info": {"title": "Detector backend for Label Studio", "version": ml_backend.__version__},
        "security": [{"basic": []}, {"secret": []}, {}],
        "paths": {
            "/": {"get": _operation("The same as /health", {200: _UP})},
            "/health": {"get": _operation(_HEALTH, {200: _UP})},
            "/setup": {
                "post": _operation(
                    "Introduces a project; answers the version that would predict for it",
                    {200: _object(model_version=_TEXT)},
                    Setup,
                )
            },
            "/predict": {
                "post": _operation(
                    "Boxes for tasks, in their order; an empty list for a task without an answer",
                    {
                        200: _object(
                            optional=("model_version",),
                            results=_list(prediction),
                            model_version=_TEXT,
                        )
                    },
                    Predict,
                )
            },
            "/webhook": {
                "post": _operation("What happened in Label Studio", {200: webhook}, "Webhook")
            },
            "/versions": {
                "get": _operation(
                    "Model versions, live ones first", {200: _object(versions=_list(_TEXT))}
                )
            },
            "/validate": {
                "post": _operation(
                    "Can boxes be drawn with a label config?",
                    {200: _object(status={"const": "ok"}, labels=_list(_TEXT))},
                    Validate,
                )
            },
            "/train": {
                "post": _operation(
                    "Starts a training at once, or says why not", {201: _ASKED, 409: _ASKED}, Train
                )
            },
            "/job_status": {
                "post": _operation("How a job is doing", {200: _ref("Job")}, JobStatus)
            },
            "/duplicate_model": {"post": _operation("Copies nothing", {200: _DONE})},
            "/delete": {"post": _operation("Deletes nothing", {200: _DONE})},
            "/metrics": {"get": metrics},
            "/openapi.json": {"get": _operation("This description", {200: {"type": "object"}})},
        },
        "components": {
            "schemas": {**_SCHEMAS, **bodies["$defs"]},
            "securitySchemes": {
                "basic": {"type": "http", "scheme": "basic"},
                "secret": {
                    "type": "apiKey",
                    "in": "header",
                    "name": SECRET_HEADER,
                    "description": "For /webhook, where ML_BACKEND_WEBHOOK_SECRET is set.",
                },
            },
        },
    }


@blueprint.get("/openapi.json")
def openapi() -> Schema:
    """Answers the description."""
    return description()
