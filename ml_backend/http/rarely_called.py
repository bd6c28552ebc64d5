"""`POST /duplicate_model` and `POST /delete`: Label Studio knows them and hardly calls them.

A detector belongs to its project's annotations: a duplicated project learns its own from what is
annotated there. A deleted connection keeps its versions, so that reconnecting loses nothing.
"""

from __future__ import annotations

from flask import Blueprint

blueprint = Blueprint("rarely_called", __name__)


@blueprint.post("/duplicate_model")
def duplicate_model() -> dict[str, str]:
    """Nothing is copied."""
    return {
        "status": "ok",
        "detail": "nothing was copied: each project trains its own detector from its annotations",
    }


@blueprint.post("/delete")
def delete() -> dict[str, str]:
    """Nothing is deleted."""
    return {
        "status": "ok",
        "detail": "model versions and annotations are kept: reconnecting finds them again",
    }
