"""`POST /setup`: Label Studio introduces a project and asks which version would predict for it."""

from __future__ import annotations

import re

from flask import Blueprint
from pydantic import BaseModel

from ml_backend.http.request import backend, read_body
from ml_backend.label_studio.events import parse_project_key
from ml_backend.label_studio.label_config import parse_label_config

blueprint = Blueprint("setup", __name__)


class Setup(BaseModel):
    """Holds the body, as Label Studio sends it."""

    project: str
    schema_: str = ""
    hostname: str | None = None
    access_token: str | None = None

    model_config = {"alias_generator": lambda name: name.rstrip("_")}


@blueprint.post("/setup")
def setup() -> dict[str, str]:
    """Answers the model version in milliseconds, without loading the model."""
    body = read_body(Setup)
    key = parse_project_key(body.project)
    parse_label_config(body.schema_)
    project = backend().ingest.introduce(
        key.key,
        key.id,
        label_config=body.schema_,
        url=_without_user((body.hostname or "").rstrip("/")) or None,
        token=body.access_token or None,
    )
    return {"model_version": backend().models.version(project)}


def _without_user(url: str) -> str:
    """Removes user and password from an address, since logs and `/metrics` show it."""
    return re.sub(r"(?<=//)[^/?#]*@", "", url)
