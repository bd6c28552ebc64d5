"""Checks Label Studio: address, token, and its recent answers."""

from __future__ import annotations

from collections.abc import Iterable

from ml_backend.doctor.finding import Examined, Finding, found
from ml_backend.label_studio.errors import LabelStudioError


def reached(backend: Examined) -> Iterable[Finding]:
    """Checks whether Label Studio answers and accepts the token."""
    client = backend.label_studios.default()
    if client is None:
        missing = [
            name
            for name, value in (
                ("LABEL_STUDIO_URL", backend.settings.label_studio_url),
                ("LABEL_STUDIO_API_KEY", backend.settings.label_studio_api_key),
            )
            if not value
        ]
        yield found("Label Studio", "error", "label_studio_not_set", settings=missing)
        return
    try:
        version = client.version()
    except LabelStudioError as error:
        yield found("Label Studio", "error", "label_studio_fails", detail=str(error))
        return
    yield found("Label Studio", "ok", "label_studio_answers", url=client.url, version=str(version))
    try:
        who = client.whoami()
    except LabelStudioError as error:
        yield found("token", "error", "token_refused", detail=str(error))
    else:
        yield found("token", "ok", "token_accepted", user=who.get("email", "valid"))


def failing(backend: Examined) -> Iterable[Finding]:
    """Lists the requests of server and worker that fail, also to other Label Studios."""
    for contact in backend.label_studios.connectivity.all():
        if contact.failing_since is not None:
            yield found(
                "requests",
                "warning",
                "requests_fail",
                url=contact.url,
                since=f"{contact.failing_since:%Y-%m-%d %H:%M:%S}",
                detail=contact.detail,
            )
