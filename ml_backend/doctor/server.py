"""Checks whether the server answers at the address under which Label Studio reaches it."""

from __future__ import annotations

from collections.abc import Iterable

import requests
from sqlalchemy import select

from ml_backend.doctor.finding import Examined, Finding, found
from ml_backend.store.tables import Project

_TIMEOUT = 2
"""Seconds."""


def server(backend: Examined) -> Iterable[Finding]:
    """Checks whether the server answers at the connections' addresses, or at `HOST:PORT`.

    A connection's address may be reachable only from Label Studio's network: then an answer at
    `HOST:PORT` suffices.
    """
    own = backend.settings.own_url
    for url in _connection_urls(backend) or [own]:
        failure = _failure(url)
        if failure is None:
            code = "server_up" if url == own else "server_up_at_connection"
            yield found("server", "ok", code, url=url)
        elif url == own:
            yield found("server", "error", "server_down", url=url, failure=failure)
        elif _failure(own) is None:
            yield found("server", "ok", "server_up_here", own=own, url=url, failure=failure)
        else:
            yield found(
                "server", "error", "server_down_everywhere", own=own, url=url, failure=failure
            )


def _connection_urls(backend: Examined) -> list[str]:
    """Reads the address of the project's connection, or those of all where none is named."""
    query = select(Project.connection_url).where(Project.connection_url.is_not(None)).distinct()
    if backend.project is not None:
        query = query.where(
            Project.label_studio_id == backend.project, Project.is_default.is_not(False)
        )
    with backend.database.reading() as session:
        return sorted(url for url in session.scalars(query) if url is not None)


def _failure(url: str) -> str | None:
    """Requests `/health` at an address; names the failure, or answers None."""
    try:
        requests.get(f"{url}/health", timeout=_TIMEOUT).raise_for_status()
    except requests.RequestException as error:
        return type(error).__name__
    return None
