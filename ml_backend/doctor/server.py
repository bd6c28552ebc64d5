"""The check of the server: does it answer where Label Studio reaches it?"""

from __future__ import annotations

from collections.abc import Iterable

import requests
from sqlalchemy import select

from ml_backend.doctor.finding import Examined, Finding
from ml_backend.store.tables import Project

_TIMEOUT = 2
"""Seconds."""


def server(backend: Examined) -> Iterable[Finding]:
    """Looks whether the server answers at the connections' addresses, or at `HOST:PORT`.

    A connection's address may be good inside Label Studio's network alone: then it is enough that
    the server answers at `HOST:PORT`.
    """
    own = backend.settings.own_url
    for url in _connection_urls(backend) or [own]:
        failure = _failure(url)
        if failure is None:
            where = "" if url == own else ", the address of the connection,"
            yield Finding("server", "ok", f"{url}{where} is up")
        elif url != own and _failure(own) is None:
            yield Finding(
                "server",
                "ok",
                f"{own} is up; {url}, the address of the connection, does not answer from here "
                f"({failure}), as may be where only Label Studio reaches it",
            )
        else:
            tried = url if url == own else f"{url}, the address of the connection,"
            also = "" if url == own else f", nor does {own}"
            yield Finding(
                "server",
                "error",
                f"{tried} does not answer ({failure}){also}",
                "start it: `ml-backend serve`",
            )


def _connection_urls(backend: Examined) -> list[str]:
    """The addresses of the project's connection, or of all connections where none is named."""
    query = select(Project.connection_url).where(Project.connection_url.is_not(None)).distinct()
    if backend.project is not None:
        query = query.where(
            Project.label_studio_id == backend.project, Project.is_default.is_not(False)
        )
    with backend.database.reading() as session:
        return sorted(url for url in session.scalars(query) if url is not None)


def _failure(url: str) -> str | None:
    """Why the server does not answer at an address; None where it does."""
    try:
        requests.get(f"{url}/health", timeout=_TIMEOUT).raise_for_status()
    except requests.RequestException as error:
        return type(error).__name__
    return None
