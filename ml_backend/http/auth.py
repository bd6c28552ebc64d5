"""Checks basic authentication, on every endpoint but `/health`, and the webhook's secret."""

from __future__ import annotations

import binascii
import hmac
from base64 import b64decode

from flask import Response, request

from ml_backend.http.errors import error_response
from ml_backend.http.request import backend
from ml_backend.projects.connect import SECRET_HEADER


def require_authentication() -> Response | None:
    """Refuses a request that lacks what the settings ask for; runs before every request."""
    settings = backend().settings
    if request.path == "/health":
        return None
    if "Origin" in request.headers and request.method != "GET":
        # Only browsers send this header: a web page would use the access of whoever opened it.
        return error_response(403, "web pages may not ask: Label Studio's server and programs do")
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
    wanted = ":".join(settings.basic_auth)
    given = _credentials(request.headers.get("Authorization", ""))
    # Clients differ in the charset (RFC 7617, section 2.1): Label Studio sends Latin-1 where that
    # has the letters, browsers send UTF-8.
    if any(hmac.compare_digest(given, wanted.encode(charset)) for charset in ("utf-8", "latin-1")):
        return None
    refusal = error_response(
        401,
        "user or password of the basic authentication is missing or wrong: it must match "
        "BASIC_AUTH_USER and BASIC_AUTH_PASS of the ML backend",
    )
    refusal.headers["WWW-Authenticate"] = 'Basic realm="ml-backend"'
    return refusal


def _credentials(header: str) -> bytes:
    """Reads `user:password` of a Basic header, as it was sent; empty without such a header."""
    scheme, _, encoded = header.partition(" ")
    if scheme.lower() != "basic":
        return b""
    try:
        return b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        return b""


def _same(given: str, wanted: str) -> bool:
    return hmac.compare_digest(given.encode(), wanted.encode())
