"""`POST /delete`: Label Studio tells that a connection was deleted.

Versions and annotations are kept, so that reconnecting loses nothing.
"""

from __future__ import annotations

from flask import Blueprint

blueprint = Blueprint("delete", __name__)


@blueprint.post("/delete")
def delete() -> dict[str, str]:
    """Answers that nothing was deleted."""
    return {
        "status": "ok",
        "detail": "model versions and annotations are kept: reconnecting finds them again",
    }
