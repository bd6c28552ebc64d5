"""Defines findings of the doctor, and the parts of a backend that its checks examine."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from ml_backend.projects.clients import Clients
from ml_backend.reasons import Reason
from ml_backend.settings import Settings
from ml_backend.store.artefacts import ArtefactStore
from ml_backend.store.database import Database

Status = Literal["ok", "warning", "error"]


@dataclass(frozen=True, slots=True)
class Finding:
    """Holds the outcome of one check.

    Attributes:
        what: the thing that was examined.
        status: `ok`, `warning` or `error`.
        reason: what was found, as a code and values; `ml_backend.wording.doctor` has the words,
            and those of the remedy.
    """

    what: str
    status: Status
    reason: Reason


def found(what: str, status: Status, code: str, **values: Any) -> Finding:
    """Makes a finding.

    Args:
        what: the thing that was examined.
        status: `ok`, `warning` or `error`.
        code: a code of `ml_backend.wording.doctor`, without `doctor.`.
        values: JSON values that its words mention.
    """
    return Finding(what, status, Reason(f"doctor.{code}", values))


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
