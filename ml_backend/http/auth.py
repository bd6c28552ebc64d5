"""Who may ask: basic authentication on everything but `/health`, and the webhook's secret."""

from __future__ import annotations

import hmac

from flask import Response, request

from ml_backend.http.current import backend
from ml_backend.http.errors import error_response
from ml_backend.learning.connect import SECRET_HEADER


def require_authentication() -> Response | None:
    """Refuses a request that lacks what the settings ask for; runs before every request."""
    settings = backend().settings
    if request.path == "/health":
        return None
    secret = settings.webhook_secret
    if secret is not None and request.path == "/webhook":
        sent = request.headers.get(SECRET_HEADER, "")
        if _same(sent, secret.get_secret_value()):
            return None
        return error_response(
            401,
            f"the webhook lacks the right {SECRET_HEADER}: run `ml-backend connect` again, "
            "it puts it there",
        )
    if settings.basic_auth is None:
        return None
    user, password = settings.basic_auth
    given = request.authorization
    # Both are compared, whatever the first says: the time taken tells nothing.
    right = [
        _same(given.username or "" if given else "", user),
        _same(given.password or "" if given else "", password),
    ]
    if all(right):
        return None
    refusal = error_response(
        401,
        "user or password of the basic authentication is missing or wrong: it must match "
        "BASIC_AUTH_USER and BASIC_AUTH_PASS of the ML backend",
    )
    refusal.headers["WWW-Authenticate"] = 'Basic realm="ml-backend"'
    return refusal


def _same(given: str, wanted: str) -> bool:
    return hmac.compare_digest(given.encode(), wanted.encode())
