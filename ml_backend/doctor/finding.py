"""Defines findings of the doctor, and the parts of a backend that its checks examine."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from ml_backend.projects.clients import Clients
from ml_backend.settings import Settings
from ml_backend.store.artefacts import ArtefactStore
from ml_backend.store.database import Database


@dataclass(frozen=True, slots=True)
class Finding:
    """Holds the outcome of one check.

    Attributes:
        what: the thing that was examined.
        status: `ok`, `warning` or `error`.
        detail: what was found.
        remedy: what to do, where something is to be done.
    """

    what: str
    status: Literal["ok", "warning", "error"]
    detail: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Examined:
    """Holds the parts of a backend that checks examine.

    Attributes:
        settings: what the admin set.
        database: its database.
        artefacts: the artefacts of its versions.
        label_studios: clients by project.
        project: Label Studio's id of the project to look at, where one is named.
    """

    settings: Settings
    database: Database
    artefacts: ArtefactStore
    label_studios: Clients
    project: int | None


Check = Callable[[Examined], Iterable[Finding]]
"""Examines one thing, or several of a kind; its docstring names them."""
