"""What every endpoint needs of the running application."""

from __future__ import annotations

import json
import re
import threading
from typing import Any, TypeVar, cast

from flask import current_app, request
from pydantic import BaseModel, ValidationError

from ml_backend.backend import Backend
from ml_backend.http.errors import BadRequest
from ml_backend.learning import projects
from ml_backend.store.tables import Project

Body = TypeVar("Body", bound=BaseModel)
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def backend() -> Backend:
    """The backend that this application serves."""
    return cast(Backend, current_app.extensions["ml_backend"])


def predicting() -> threading.BoundedSemaphore:
    """Held by each request to predict that is worked on."""
    return cast(threading.BoundedSemaphore, current_app.extensions["predicting"])


def read_json() -> dict[str, Any]:
    """The request's body, a JSON object.

    Raises:
        BadRequest: it is something else, or holds half a character (a lone surrogate), which no
            database and no answer can hold.
    """
    content = request.get_json(force=True, silent=True)
    if not isinstance(content, dict):
        raise BadRequest("the body must be a JSON object")
    if _SURROGATE.search(request.get_data()):
        try:
            json.dumps(content, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise BadRequest("the body holds text that is not valid Unicode") from None
    return content


def read_body(model: type[Body]) -> Body:
    """The request's JSON body, checked.

    Raises:
        BadRequest: it is not JSON, or a field is missing or wrong; the text names the field.
    """
    try:
        return model.model_validate(read_json())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BadRequest(f"{where}: {first['msg']}") from None


def find_project(name: str) -> Project:
    """A known project by its key, or by its id where that is clear.

    Raises:
        InvalidEvent: it is neither a key nor an id.
        ProjectNotFound: there is none, or several.
    """
    return projects.find_project(backend().database, name)
