"""The worker: takes jobs from the queue, and looks every second whether a training is due.

The jobs table is the truth, the queue only hands jobs out: whatever is lost with a killed process
is found in the table and handed out again.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout
from huey import RedisHuey, SqliteHuey
from huey.api import Huey
from huey.consumer import ConsumerStopped
from sqlalchemy import select

from ml_backend.audits.audits import Audits
from ml_backend.jobs.jobs import Jobs, TakenOver
from ml_backend.label_studio.client import Passing
from ml_backend.projects.clients import Clients
from ml_backend.projects.connection_title import ConnectionTitle
from ml_backend.serving.stale_predictions import NotYet, Tidy
from ml_backend.settings import Settings
from ml_backend.store.database import Database
from ml_backend.store.tables import Job, Project, now
from ml_backend.worker.supervisor import (
    AUTO_LABELLING,
    HANDED_OVER,
    Program,
    supervise,
    training,
)

_log = logging.getLogger(__name__)

_TICK = 1.0
_LAST = 5.0
"""Seconds that work in progress has to end when the worker stops."""
_BUSY = 3.0
"""Seconds before a job looks again whether another one has ended."""
_STEP_AGAIN = 30.0
"""Seconds until a project that could not be brought into step is tried again."""
_AUDIT_EVERY = 5.0
"""Seconds between two audits of a project: people annotate faster than anyone looks at them."""


def make_queue(settings: Settings) -> Huey:
    """The queue: a SQLite file below `MODEL_DIR`, or Redis, by `QUEUE_URL`."""
    url = settings.queue_url
    if url and url.startswith("redis"):
        return RedisHuey("ml-backend", url=url, results=False)
    file = Path(url.removeprefix("sqlite:///")) if url else settings.model_dir / "queue.db"
    file.parent.mkdir(parents=True, exist_ok=True)
    return SqliteHuey("ml-backend", filename=str(file), results=False)


def turn(settings: Settings, kind: str) -> FileLock:
    """Held by the one process on a `MODEL_DIR` that works on a kind of job; `Timeout` says that
    another does."""
    return FileLock(settings.model_dir / f"{kind}.lock", blocking=False)


class Tasks:
    """What the queue carries: the number of a job, or of a project to look at.

    Args:
        queue: where they are put, and taken from by a worker.
    """

    def __init__(self, queue: Huey) -> None:
        self.queue = queue
        self._work: dict[str, Callable[[int], None]] = {}
        self._run = queue.task(name="run")(self._do)

    def put(self, kind: str, number: int, *, wait: float = 0) -> None:
        """Puts a piece of work into the queue, to be taken after `wait` seconds."""
        if wait:
            self._run.schedule(args=(kind, number), delay=wait)
        else:
            self._run(kind, number)

    def on(self, kind: str, work: Callable[[int], None]) -> None:
        """Says what a worker does with a kind of work."""
        self._work[kind] = work

    def _do(self, kind: str, number: int) -> None:
        self._work[kind](number)


class Worker:
    """Trains, predicts what nobody has annotated, and keeps Label Studio in step."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        jobs: Jobs,
        tasks: Tasks,
        connection_title: ConnectionTitle,
        audits: Audits,
        label_studios: Clients,
        tidy: Tidy,
    ) -> None:
        self._settings = settings
        self._database = database
        self._jobs = jobs
        self._tasks = tasks
        self._connection_title = connection_title
        self._audits = audits
        self._label_studios = label_studios
        self._tidy = tidy
        self._stopping = threading.Event()
        self._mine: dict[int, Job] = {}
        self._seen: dict[int, int] = {}
        self._due: dict[int, datetime] = {}
        self._live: dict[int, str | None] = {}
        self._step_at: dict[int, float] = {}
        self._rest: dict[int, tuple[str | None, datetime | None]] = {}
        self._audited: dict[int, int] = {}
        self._audit_at: dict[int, float] = {}
        tasks.on("train", self._train)
        tasks.on("predict", self._predict)
        tasks.on("the rest", self._label_the_rest)
        tasks.on("autolabel", self._autolabel)
        tasks.on("tidy", self._remove_older)
        tasks.on("in step", self._keep_in_step)
        tasks.on("audit", self._audit)

    def run(self) -> None:
        """Works until the process is told to stop; what runs then is put back, and not counted."""
        ticker = threading.Thread(target=self._tick, name="ticker", daemon=True)
        ticker.start()
        # Threads: a training only waits for its process, so four of them serve several projects.
        consumer = self._tasks.queue.create_consumer(
            workers=4,
            worker_type="thread",
            max_delay=1.0,
            check_worker_health=True,
            shutdown_timeout=_LAST,
        )
        consumer.start()
        # Not the consumer's own: it waits for what runs, or lets go of it, before we hear of it.
        # They set no event: a second signal would wait for ever for the first to do so.
        told: list[int] = []
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(signum, lambda number, _: told.append(number))
        try:
            checked: float | None = time.monotonic()
            with suppress(ConsumerStopped):
                while not told:
                    checked = consumer.loop(checked)
        finally:
            self._stopping.set()
            consumer.stop(graceful=True)
            # Now that nobody here takes it again.
            for job in list(self._mine.values()):
                if self._jobs.try_again(job.id, "the worker was stopped", wait=0, counts=False):
                    self._tasks.put(job.kind, job.id)
            ticker.join()

    def _tick(self) -> None:
        while not self._stopping.wait(_TICK):
            try:
                self._database.checkpoint()
                self._jobs.recover()
                for job_id, kind in self._jobs.due():
                    self._jobs.touch(job_id)
                    self._tasks.put(kind, job_id)
                self._look_at_projects()
            except Exception:
                # The database may be away for a moment; the next tick tries again.
                _log.exception("looking for work failed")

    def _look_at_projects(self) -> None:
        with self._database.reading() as session:
            projects = session.scalars(select(Project)).all()
        for project in projects:
            due = self._due.get(project.id)
            changed = self._seen.get(project.id, -1) != project.revision
            if project.revision > project.trained_revision and (
                changed or (due is not None and due <= now())
            ):
                self._seen[project.id] = project.revision
                asked = self._jobs.consider_training(project.id)
                self._due.pop(project.id, None)
                if asked.enqueue:
                    self._tasks.put("train", asked.job)
                elif (until := self._jobs.waiting_until(project.id)) is not None:
                    self._due[project.id] = until
            # Once after the start as well: a worker may have died between promotion and step.
            step_at = self._step_at.get(project.id)
            if self._live.get(project.id) != project.live_version or (
                step_at is not None and step_at <= time.monotonic()
            ):
                self._live[project.id] = project.live_version
                self._step_at.pop(project.id, None)
                self._tasks.put("in step", project.id)
            # A version may be new, or tasks.
            rest = (project.live_version, project.heard_at)
            if self._settings.auto_label and self._rest.get(project.id) != rest:
                self._rest[project.id] = rest
                self._tasks.put("the rest", project.id)
            moment = time.monotonic()
            if (
                self._audited.get(project.id) != project.revision
                and self._audit_at.get(project.id, moment) <= moment
            ):
                self._audited[project.id] = project.revision
                self._audit_at[project.id] = moment + _AUDIT_EVERY
                self._tasks.put("audit", project.id)

    def _train(self, job_id: int) -> None:
        job = self._in_turn("train", job_id, training(self._settings))
        if job is not None:
            # What changed meanwhile is looked at again.
            self._seen.pop(job.project_id, None)

    def _label_the_rest(self, project_id: int) -> None:
        with self._database.reading() as session:
            project = session.get_one(Project, project_id)
        if self._label_studios.client(project) is None:
            # Without a token nothing can be imported; the command says so.
            return
        asked = self._jobs.consider_autolabel(project_id)
        if asked is not None and asked.enqueue:
            self._tasks.put("autolabel", asked.job)

    def _autolabel(self, job_id: int) -> None:
        job = self._in_turn("autolabel", job_id, AUTO_LABELLING)
        if job is not None:
            # Another version may have gone live, and tasks may have come.
            self._rest.pop(job.project_id, None)

    def _in_turn(self, kind: str, job_id: int, program: Program) -> Job | None:
        """Runs a job's program, unless one like it runs; None where it was not run."""
        # Two at once on one machine would only slow each other.
        try:
            with turn(self._settings, kind):
                return self._supervise(job_id, program)
        except Timeout:
            self._tasks.put(kind, job_id, wait=_BUSY)
            self._jobs.touch(job_id)
            return None

    def _supervise(self, job_id: int, program: Program) -> Job | None:
        with self._claimed(job_id) as job:
            if job is None:
                return None
            ended = supervise(program, job_id, self._jobs, self._settings, self._stopping)
            _log.info("job %d, %s: %s %s", job_id, program.what, ended.status, ended.reason)
            # Whoever stops the worker may have stopped its processes as well.
            if ended.status == "crashed" and not self._stopping.is_set():
                self._jobs.try_again(job_id, ended.reason, wait=5.0 * job.attempt)
            return job

    @contextmanager
    def _claimed(self, job_id: int) -> Iterator[Job | None]:
        """A job, if it can be had; it is ours until its work ends, or the worker."""
        job = None if self._stopping.is_set() else self._jobs.claim(job_id)
        if job is not None:
            self._mine[job_id] = job
        try:
            yield job
        finally:
            if not self._stopping.is_set():
                self._mine.pop(job_id, None)

    def _predict(self, job_id: int) -> None:
        self._in_turn("predict", job_id, HANDED_OVER)

    def _remove_older(self, job_id: int) -> None:
        with self._claimed(job_id) as job:
            if job is not None:
                self._tidy_up(job)

    def _tidy_up(self, job: Job) -> None:
        try:
            self._jobs.finish(job.id, "done", self._tidy.finish(job, self._jobs))
        except TakenOver:
            _log.warning("job %d was silent for too long, and another run has it now", job.id)
        except NotYet as reason:
            self._jobs.try_again(job.id, str(reason), wait=reason.wait, counts=False)
        except Passing as failure:
            with self._database.reading() as session:
                project = session.get_one(Project, job.project_id)
            wait = self._label_studios.wait(project)
            self._jobs.try_again(job.id, str(failure), wait=wait, counts=False)
        except Exception as error:
            _log.exception("job %d", job.id)
            self._jobs.try_again(job.id, str(error), wait=60.0 * job.attempt)

    def _keep_in_step(self, project_id: int) -> None:
        if not self._connection_title.update(project_id):
            # Not by way of the queue, which outlives us: each start would add one more.
            self._step_at[project_id] = time.monotonic() + _STEP_AGAIN

    def _audit(self, project_id: int) -> None:
        wait = self._audits.update(project_id)
        if wait is not None:
            self._audit_at[project_id] = time.monotonic() + wait
            self._audited.pop(project_id, None)
