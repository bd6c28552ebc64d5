"""Reads requests, for all endpoints: the backend they are for, their bodies, their project."""

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
# Escapes of surrogates and of NUL: only a body with one of them is searched for such characters.
_SUSPECT = re.compile(rb"\\u(?:[dD][89a-fA-F]|0000)")
_OPENING = (b"{", b"[")
MOST = 1_000_000
"""Objects and lists of a body at most: parsing a million keeps other requests waiting for 1 s."""
DEEPEST = 100
"""Levels of a body at most: beyond, Python's recursion limit decides whether a body is read."""
_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")


def backend() -> Backend:
    """Returns the backend that this application serves."""
    return cast(Backend, current_app.extensions["ml_backend"])


def predicting() -> threading.BoundedSemaphore:
    """Returns the semaphore that each request to predict holds while it is worked on."""
    return cast(threading.BoundedSemaphore, current_app.extensions["predicting"])


def read_json() -> dict[str, Any]:
    """Reads the request's body, a JSON object.

    Raises:
        BadRequest: the body is no JSON object or did not arrive whole, or it holds a lone
            surrogate, NUL, NaN or an infinite number, which databases and answers cannot hold, or
            more objects than `MOST` or levels than `DEEPEST`.
        RequestEntityTooLarge: the body is larger than the settings allow.
    """
    try:
        data = request.get_data()
    except (ParseException, ClientDisconnected, OSError) as error:
        raise BadRequest(f"the body did not arrive whole ({type(error).__name__})") from error
    limit = request.max_content_length
    # Without a stated length (chunks), Werkzeug cuts the body off at the limit.
    if request.content_length is None and limit and len(data) >= limit:
        raise RequestEntityTooLarge
    if sum(map(data.count, _OPENING)) > MOST:
        raise BadRequest(f"the body holds more than {MOST:,} objects and lists: send fewer at once")
    try:
        # Only UTF-8 (RFC 8259): in other charsets, the search below would miss characters.
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
    """Reads the request's JSON body and checks it.

    Raises:
        BadRequest: the body is not JSON, or a field is missing or wrong; the text names the field.
    """
    try:
        return model.model_validate(read_json())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BadRequest(f"{where}: {first['msg']}") from None


def find_project(name: str) -> Project:
    """Finds a known project by its key, or by its id where only one project has it.

    Raises:
        InvalidEvent: the name is neither a key nor an id.
        ProjectNotFound: no project has it, or several have.
    """
    return projects.find_project(backend().database, name)
