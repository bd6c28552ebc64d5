"""Makes the Flask application that gunicorn serves."""

from __future__ import annotations

import logging
import threading
import time

from flask import Flask, Response, g, request

from ml_backend.backend import Backend
from ml_backend.extensions import check_extensions
from ml_backend.http import (
    delete,
    duplicate_model,
    errors,
    health,
    job_status,
    metrics,
    openapi,
    predict,
    setup,
    train,
    validate,
    versions,
    webhook,
)
from ml_backend.http.auth import require_authentication
from ml_backend.serving.counters import REQUEST_SECONDS
from ml_backend.settings import load_settings


def create_app(backend: Backend | None = None) -> Flask:
    """Makes the application.

    Args:
        backend: the backend to serve; made from the settings by default.

    Raises:
        SettingsError: a setting is unknown or wrong.
        DeviceError: the device of the settings cannot be used.
        ExtensionError: another package's extension cannot be imported.
    """
    check_extensions()
    backend = backend or Backend(load_settings())
    logging.basicConfig(
        level=backend.settings.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    app = Flask("ml_backend")
    app.config["MAX_CONTENT_LENGTH"] = backend.settings.max_request_bytes
    app.extensions["ml_backend"] = backend
    app.extensions["predicting"] = threading.BoundedSemaphore(backend.settings.predicts_at_a_time)
    app.before_request(require_authentication)
    app.before_request(_start_clock)
    app.after_request(_stop_clock)
    errors.register(app)
    for part in (
        health,
        setup,
        predict,
        webhook,
        versions,
        validate,
        train,
        job_status,
        duplicate_model,
        delete,
        metrics,
        openapi,
    ):
        app.register_blueprint(part.blueprint)
    # Here, a device that cannot be used stops the start. The models are loaded now, so that the
    # first request does not wait for them.
    backend.models.own_device()
    threading.Thread(target=lambda: backend.serving, daemon=True).start()
    return app


def _start_clock() -> None:
    g.started = time.perf_counter()


def _stop_clock(response: Response) -> Response:
    if "started" in g:
        REQUEST_SECONDS.labels(request.endpoint or "unknown", response.status_code).observe(
            time.perf_counter() - g.started
        )
    return response
