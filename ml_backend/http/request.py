"""What every endpoint needs of the running application."""

from __future__ import annotations

import json
import math
import re
import threading
from typing import Any, TypeVar, cast

from flask import current_app, request
from gunicorn.http.errors import ParseException
from pydantic import BaseModel, ValidationError
from werkzeug.exceptions import ClientDisconnected, RequestEntityTooLarge

from ml_backend.backend import Backend
from ml_backend.http.errors import BadRequest
from ml_backend.projects import find as projects
from ml_backend.store.tables import Project

Body = TypeVar("Body", bound=BaseModel)
# Where it occurs, what was read may hold half a character, or NUL: that takes a closer look.
_SUSPECT = re.compile(rb"\\u(?:[dD][89a-fA-F]|0000)")
_OPENING = (b"{", b"[")
MOST = 1_000_000
"""Objects and lists of a body: a million take a second, during which nobody else is answered."""
DEEPEST = 100
"""Levels of a body: what is deeper is read by one process and not by the next, whose calls are."""
_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")


def backend() -> Backend:
    """The backend that this application serves."""
    return cast(Backend, current_app.extensions["ml_backend"])


def predicting() -> threading.BoundedSemaphore:
    """Held by each request to predict that is worked on."""
    return cast(threading.BoundedSemaphore, current_app.extensions["predicting"])


def read_json() -> dict[str, Any]:
    """The request's body, a JSON object.

    Raises:
        BadRequest: it is something else, or holds what no database and no answer can hold: half a
            character (a lone surrogate), NUL, NaN, an infinite number, level upon level, or more
            than anyone reads; or it did not arrive whole.
        RequestEntityTooLarge: it is larger than the settings allow.
    """
    try:
        data = request.get_data()
    except (ParseException, ClientDisconnected, OSError) as error:
        raise BadRequest(f"the body did not arrive whole ({type(error).__name__})") from error
    limit = request.max_content_length
    # A body in chunks says its size by its end, and is cut off at the limit.
    if request.content_length is None and limit and len(data) >= limit:
        raise RequestEntityTooLarge
    if sum(map(data.count, _OPENING)) > MOST:
        raise BadRequest(f"the body holds more than {MOST:,} objects and lists: send fewer at once")
    try:
        # UTF-8 alone (RFC 8259): other charsets would hide from the look below what it looks for.
        text = data.decode("utf-8-sig")
        content = json.loads(text, parse_constant=_finite, parse_float=_finite)
    except BadRequest:
        raise
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise BadRequest("the body must be a JSON object")
    if _SUSPECT.search(data):
        text = json.dumps(content, ensure_ascii=False)
        try:
            text.encode()
        except UnicodeEncodeError:
            raise BadRequest("the body holds text that is not valid Unicode") from None
        if _NUL.search(text):
            raise BadRequest("the body holds text with the character NUL")
    if _is_deep(content):
        raise BadRequest(f"the body is nested too deeply: {DEEPEST} levels are enough")
    return content


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise BadRequest(f"the body holds a number that is not finite: {text[:40]}")
    return number


def _is_deep(content: dict[str, Any]) -> bool:
    level: list[dict[str, Any] | list[Any]] = [content]
    for _ in range(DEEPEST):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True


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
