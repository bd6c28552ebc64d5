"""Notes how each Label Studio answers, for `/metrics` and `doctor`.

Server, worker and their processes all send requests; each notes the outcomes in the database.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.exc import DatabaseError

from ml_backend.label_studio.errors import Passing
from ml_backend.store.database import Database, is_outside
from ml_backend.store.tables import Contact, now

_log = logging.getLogger(__name__)

_NOTE_EVERY = 30.0
"""Seconds after which the same outcome is noted again."""
_SOONEST = timedelta(seconds=30)
_LATEST = timedelta(minutes=10)


class Connectivity:
    """Notes the outcomes of requests to Label Studio.

    Args:
        database: where it is noted.
        note: receives the notes instead, where this process does not write to the database.
    """

    def __init__(
        self, database: Database, note: Callable[[str, str, str], None] | None = None
    ) -> None:
        self._database = database
        self._note = note or self.write
        self._lock = threading.Lock()
        self._noted: dict[str, tuple[str, float]] = {}

    def note(self, url: str, failure: Passing | None) -> None:
        """Notes the outcome of a request.

        A database that cannot be written does not make the request fail: that is logged.

        Args:
            url: the Label Studio.
            failure: why it did not do as asked; None where it did.
        """
        kind = failure.kind if failure is not None else ""
        with self._lock:
            before, at = self._noted.get(url, (None, 0.0))
            if kind == before and time.monotonic() < at + _NOTE_EVERY:
                return
            self._noted[url] = kind, time.monotonic()
        self._note(url, kind, str(failure) if failure is not None else "")

    def wait(self, url: str) -> float:
        """Computes the seconds until a Label Studio that fails is asked again.

        The wait equals the time for which it has failed, but is between 30 s and 10 minutes.
        """
        with self._database.reading() as session:
            since = session.scalar(select(Contact.failing_since).where(Contact.url == url))
        failing = now() - since if since is not None else _SOONEST
        return min(max(failing, _SOONEST), _LATEST).total_seconds()

    def all(self) -> list[Contact]:
        """Reads one row for each Label Studio that was ever asked."""
        with self._database.reading() as session:
            return list(session.scalars(select(Contact).order_by(Contact.url)))

    def write(self, url: str, kind: str, detail: str) -> None:
        """Stores how a Label Studio answered.

        Args:
            url: its address.
            kind: of the failure, as `/metrics` names it; empty where it did what was asked.
            detail: the same in words.
        """
        moment: dict[str, Any] = {"failing_since": now()} if kind else {"answered_at": now()}
        values = {"url": url, "failure": kind, "detail": detail, **moment}
        statement = self._database.insert(Contact).values(values)
        changed = {**values, "failing_since": None}
        if kind:
            since = statement.excluded.failing_since
            changed["failing_since"] = func.coalesce(Contact.failing_since, since)
        try:
            self._database.change(
                statement.on_conflict_do_update(index_elements=["url"], set_=changed)
            )
        except DatabaseError as error:
            if not is_outside(error):
                raise
            _log.warning("how %s answers is not noted: %s", url, error.orig)
