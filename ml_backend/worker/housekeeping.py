"""Looks every second for work that nobody asks for.

Such work is: a training that is due, tasks without predictions, a connection's title that does not
show the live version, changed annotations whose audit is due, and jobs whose worker died.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import select
from sqlalchemy.exc import DatabaseError

from ml_backend.audits.audits import Audits
from ml_backend.audits.rollback import AuditedRollback
from ml_backend.jobs.jobs import Jobs
from ml_backend.jobs.live_heads import LiveHeadRequests
from ml_backend.jobs.requests import Requests
from ml_backend.label_studio.errors import LabelStudioError
from ml_backend.projects.clients import Clients
from ml_backend.projects.connection_title import ConnectionTitle
from ml_backend.projects.ingest import Ingest
from ml_backend.projects.reconcile import reconcile
from ml_backend.settings import Settings
from ml_backend.store.database import Database, is_outside
from ml_backend.store.states import JobState
from ml_backend.store.tables import Project, now

_log = logging.getLogger(__name__)

_TICK = 1.0
_TITLE_AGAIN = 30.0
"""Seconds until a connection whose title could not be changed is tried again."""
_AUDIT_EVERY = 5.0
"""Seconds between two audits of a project: people annotate faster than anyone looks at them."""
_IMPORTED = timedelta(seconds=2)
"""Time after the last event of an import until its annotations are read back: an import comes in
several events."""
_READ_AGAIN = 30.0
"""Seconds until another attempt to read back annotations that are still missing."""
_REQUEUE_EVERY = 10.0
_PRUNE_EVERY = 3600.0
_THREADS = 4


@dataclass(slots=True)
class _Seen:
    """The findings of the last looks at a project; times are of `time.monotonic`.

    Attributes:
        revision: for which a training was considered; -1 where that must be done again.
        fitted: the revision for which a live head was considered; -1 likewise.
        due: when the quiet time of a waiting training ends.
        live: the version that the connection's title was changed to; empty before the first look.
        title_at: when the title is tried again.
        tasks: the live version and the last sign of life for which predictions were considered.
        read_at: when annotations may be read back again.
        audited: the revision that was audited.
        audit_at: when the next audit may be.
    """

    revision: int = -1
    due: datetime | None = None
    fitted: int = -1
    live: str | None = ""
    title_at: float | None = None
    tasks: tuple[str | None, datetime | None] | None = None
    read_at: float = 0.0
    audited: int = -1
    audit_at: float = 0.0


class Housekeeping:
    """Starts such work for every project, on a thread of its own.

    Args:
        settings: whether tasks are predicted without being asked for.
        database: the projects.
        jobs: recovers jobs.
        requests: asks for jobs.
        live_heads: asks for live heads.
        ingest: stores what is read back.
        label_studios: clients by project.
        title: keeps the title of the connection.
        audits: counts how people changed predictions.
        rollback: takes back a version whose boxes people accept less.
        running: jobs that this process runs.
        forget: ends entries of the queue that nobody works on any more.
        prune: deletes old entries of the queue.
    """

    def __init__(
        self,
        settings: Settings,
        database: Database,
        jobs: Jobs,
        requests: Requests,
        live_heads: LiveHeadRequests,
        ingest: Ingest,
        label_studios: Clients,
        title: ConnectionTitle,
        audits: Audits,
        rollback: AuditedRollback,
        *,
        running: Callable[[], Iterable[int]],
        forget: Callable[[Iterable[str]], None],
        prune: Callable[[], None],
    ) -> None:
        self._settings = settings
        self._database = database
        self._jobs = jobs
        self._requests = requests
        self._live_heads = live_heads
        self._ingest = ingest
        self._label_studios = label_studios
        self._title = title
        self._audits = audits
        self._rollback = rollback
        self._running = running
        self._forget = forget
        self._prune = prune
        self._pruned_at = time.monotonic()
        self._requeued_at = -math.inf
        self._seen: dict[int, _Seen] = {}
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="housekeeping")

    def run(self, stopping: threading.Event) -> None:
        """Looks every second until the worker stops."""
        is_away = False
        while not stopping.wait(_TICK):
            try:
                self._look()
                is_away = False
            except DatabaseError as error:
                # The next look tries again.
                if not is_outside(error):
                    _log.exception("looking for work failed")
                elif not is_away:
                    _log.warning("work is looked for later: %s", error.orig)
                is_away = is_outside(error)
            except Exception:
                _log.exception("looking for work failed")
        self._pool.shutdown(wait=False, cancel_futures=True)

    def ended(self, project_id: int) -> None:
        """Looks again at a project after one of its jobs: more may have changed meanwhile."""
        seen = self._seen.get(project_id)
        if seen is not None:
            seen.revision, seen.fitted, seen.tasks = -1, -1, None

    def _look(self) -> None:
        self._database.checkpoint()
        self._forget(self._jobs.recover(set(self._running())))
        if time.monotonic() > self._requeued_at + _REQUEUE_EVERY:
            self._requeued_at = time.monotonic()
            self._jobs.requeue_lost()
        if time.monotonic() > self._pruned_at + _PRUNE_EVERY:
            self._pruned_at = time.monotonic()
            self._prune()
        with self._database.reading() as session:
            projects = session.scalars(select(Project)).all()
        for project in projects:
            seen = self._seen.setdefault(project.id, _Seen())
            self._consider_reading_back(project, seen)
            self._consider_live_head(project, seen)
            self._consider_training(project, seen)
            self._consider_title(project, seen)
            self._consider_predictions(project, seen)
            self._consider_audit(project, seen)

    def _consider_reading_back(self, project: Project, seen: _Seen) -> None:
        """Reads back where Label Studio told of annotations that no webhook brought: of an import,
        or from before the project was connected."""
        since = project.unread_since
        if since is None or now() < since + _IMPORTED or seen.read_at > time.monotonic():
            return
        # Not again before this reading has ended: of many tasks it takes minutes.
        seen.read_at = math.inf
        self._submit(self._read_back, project)

    def _consider_live_head(self, project: Project, seen: _Seen) -> None:
        if seen.fitted == project.revision:
            return
        seen.fitted = project.revision
        self._live_heads.consider(project.id)

    def _consider_training(self, project: Project, seen: _Seen) -> None:
        changed = seen.revision != project.revision
        due = seen.due is not None and seen.due <= now()
        if project.revision <= project.trained_revision or not (changed or due):
            return
        asked = self._requests.training(project.id)
        seen.revision = project.revision
        seen.due = None
        if asked.state == JobState.WAITING:
            waiting = self._requests.waiting_training(project.id)
            seen.due = waiting.not_before if waiting is not None else None

    def _consider_title(self, project: Project, seen: _Seen) -> None:
        # Once after the start as well: a worker may have died between a promotion and this.
        again = seen.title_at is not None and seen.title_at <= time.monotonic()
        if seen.live == project.live_version and not again:
            return
        seen.live, seen.title_at = project.live_version, None
        self._submit(self._update_title, project)

    def _consider_predictions(self, project: Project, seen: _Seen) -> None:
        # A version may be new, or tasks.
        tasks = (project.live_version, project.heard_at)
        if not self._settings.auto_label or seen.tasks == tasks:
            return
        seen.tasks = tasks
        self._submit(self._predict_tasks, project)

    def _consider_audit(self, project: Project, seen: _Seen) -> None:
        moment = time.monotonic()
        if seen.audited == project.revision or seen.audit_at > moment:
            return
        seen.audited, seen.audit_at = project.revision, moment + _AUDIT_EVERY
        self._submit(self._audit, project)

    def _update_title(self, project: Project) -> None:
        if not self._title.update(project.id):
            self._seen[project.id].title_at = time.monotonic() + _TITLE_AGAIN

    def _predict_tasks(self, project: Project) -> None:
        # Without a token nothing can be imported; the command says so.
        if self._label_studios.client(project) is not None:
            self._requests.autolabel(project.id)

    def _read_back(self, project: Project) -> None:
        try:
            client = self._label_studios.client(project)
            if client is None:
                return
            reconcile(project, client, self._database, self._ingest)
        except LabelStudioError as error:
            _log.warning("project %s is read back later: %s", project.key, error)
        finally:
            self._seen[project.id].read_at = time.monotonic() + _READ_AGAIN

    def _audit(self, project: Project) -> None:
        wait = self._audits.update(project.id)
        if wait is not None:
            seen = self._seen[project.id]
            seen.audited, seen.audit_at = -1, time.monotonic() + wait
            return
        self._rollback.consider(project.id)

    def _submit(self, work: Callable[[Project], None], project: Project) -> None:
        def do() -> None:
            try:
                work(project)
            except Exception:
                _log.exception("housekeeping of project %s failed; tried again", project.key)
                seen = self._seen[project.id]
                seen.tasks, seen.audited = None, -1
                seen.title_at = seen.audit_at = time.monotonic() + _TITLE_AGAIN

        self._pool.submit(do)
