"""`POST /duplicate_model`: Label Studio asks to copy a model into another project.

A detector belongs to the annotations of its project: a duplicated project trains its own.
"""

from __future__ import annotations

from flask import Blueprint

blueprint = Blueprint("duplicate_model", __name__)


@blueprint.post("/duplicate_model")
def duplicate_model() -> dict[str, str]:
    """Answers that nothing was copied."""
    return {
        "status": "ok",
        "detail": "nothing was copied: each project trains its own detector from its annotations",
    }
