"""`POST /validate`: checks whether boxes can be drawn with a label config."""

from __future__ import annotations

from flask import Blueprint
from pydantic import BaseModel, Field

from ml_backend.http.request import read_body
from ml_backend.label_studio.label_config import parse_label_config

blueprint = Blueprint("validate", __name__)


class Validate(BaseModel):
    """Holds the body: a label config."""

    config: str = Field(default="", validation_alias="label_config")

    model_config = {"populate_by_name": True}


@blueprint.post("/validate")
def validate() -> dict[str, object]:
    """Answers the labels that would be predicted, or an error that says what is missing."""
    config = parse_label_config(read_body(Validate).config)
    return {"status": "ok", "labels": list(config.labels)}
