"""Answers errors in one sentence that an admin can read.

Of a failed request Label Studio shows only the status and the reason phrase, which `requests` puts
into its exception. So the reason phrase is the message itself, shortened; the body holds it whole.
"""

from __future__ import annotations

import logging
import re
import sqlite3

from flask import Flask, Response, jsonify, request
from sqlalchemy.exc import DatabaseError
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge

from ml_backend.label_studio.events import InvalidEvent
from ml_backend.label_studio.label_config import LabelConfigError
from ml_backend.projects.find import ProjectNotFound
from ml_backend.store.artefacts import StoreUnavailable, VersionMissing
from ml_backend.store.database import is_outside

_log = logging.getLogger(__name__)
_PHRASE = 400
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


class BadRequest(ValueError):
    """Says that a request is wrong; the text names the fault and the remedy."""


def error_response(status: int, message: str) -> Response:
    """Makes a JSON error whose reason phrase is its message, shortened."""
    response = jsonify(error=message)
    phrase = " ".join(message.split()).encode("latin-1", "replace").decode("latin-1")
    # gunicorn answers 500 instead of a status line that holds one.
    phrase = _CONTROL.sub("?", phrase)
    response.status = f"{status} {phrase[:_PHRASE]}"
    return response


def register(app: Flask) -> None:
    """Answers every exception with JSON, and none with a traceback."""

    def bad_request(error: Exception) -> Response:
        return error_response(400, str(error))

    for kind in (BadRequest, LabelConfigError, InvalidEvent, ProjectNotFound):
        app.register_error_handler(kind, bad_request)

    @app.errorhandler(RecursionError)
    def too_deep(_: RecursionError) -> Response:
        return error_response(400, "the body is nested too deeply")

    @app.errorhandler(VersionMissing)
    def missing(error: VersionMissing) -> Response:
        return error_response(404, str(error))

    @app.errorhandler(StoreUnavailable)
    def no_store(error: StoreUnavailable) -> Response:
        _log.error("a request failed: %s", error)
        return error_response(503, str(error))

    @app.errorhandler(RequestEntityTooLarge)
    def too_large(_: RequestEntityTooLarge) -> Response:
        limit = app.config["MAX_CONTENT_LENGTH"]
        return error_response(
            413, f"the body is larger than {limit:,} bytes: raise ML_BACKEND_MAX_REQUEST_BYTES"
        )

    @app.errorhandler(DatabaseError)
    @app.errorhandler(sqlite3.DatabaseError)
    def no_database(error: DatabaseError | sqlite3.DatabaseError) -> Response:
        if not is_outside(error):
            return unexpected(error)
        # The cause lies outside this program: the log needs no traceback.
        cause = error.orig if isinstance(error, DatabaseError) else error
        words = f"the database or the queue cannot be used: {cause}"
        _log.error("a request failed: %s", words)
        return error_response(503, f"{words} (disk full? server down? file damaged?)")

    @app.errorhandler(HTTPException)
    def http_error(error: HTTPException) -> Response:
        words = error.description or error.name
        if error.code == 404:
            words = f"there is no {request.path}: /openapi.json describes what there is"
        response = error_response(error.code or 500, words)
        for name, value in error.get_headers():
            if name.lower() not in {"content-type", "content-length"}:
                response.headers[name] = value
        return response

    @app.errorhandler(Exception)
    def unexpected(error: Exception) -> Response:
        _log.exception("a request failed")
        return error_response(
            500, f"the ML backend failed ({type(error).__name__}): its log has the details"
        )
