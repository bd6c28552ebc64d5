"""Checks Label Studio: address, token, and its recent answers."""

from __future__ import annotations

from collections.abc import Iterable

from ml_backend.doctor.finding import Examined, Finding
from ml_backend.label_studio.client import LabelStudioError


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
        yield Finding(
            "Label Studio",
            "error",
            f"{' and '.join(missing)} not set",
            "set them: the token stands in Label Studio under Account & Settings",
        )
        return
    try:
        version = client.version()
    except LabelStudioError as error:
        yield Finding("Label Studio", "error", str(error), "check LABEL_STUDIO_URL")
        return
    yield Finding("Label Studio", "ok", f"{client.url} answers, version {version}")
    try:
        who = client.whoami()
    except LabelStudioError as error:
        yield Finding("token", "error", str(error), "check LABEL_STUDIO_API_KEY")
    else:
        yield Finding("token", "ok", f"it is {who.get('email', 'valid')}'s")


def failing(backend: Examined) -> Iterable[Finding]:
    """Lists the requests of server and worker that fail, also to other Label Studios."""
    for contact in backend.label_studios.connectivity.all():
        if contact.failing_since is not None:
            yield Finding(
                "requests",
                "warning",
                f"those to {contact.url} fail since {contact.failing_since:%Y-%m-%d %H:%M:%S} "
                f"UTC: {contact.detail}",
                "what waits for it goes on by itself once it does what is asked",
            )
