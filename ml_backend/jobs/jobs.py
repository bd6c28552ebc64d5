"""Jobs: everything that was asked for is a row with a state and a reason that people can read."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from ml_backend.jobs.schedule import Decision, Situation, decide
from ml_backend.projects.counts import annotated_tasks, changes_since
from ml_backend.settings import Settings
from ml_backend.store.database import Database
from ml_backend.store.tables import UNTRAINED, Annotation, Job, Project, Task, now

ATTEMPTS = 3
"""How often a job that crashes is tried."""

STALE_AFTER = timedelta(seconds=30)
"""A running job without a heartbeat for so long lost its worker."""

ACTIVE = ("waiting", "queued", "running")

NEW_TASKS_DELAY = timedelta(seconds=10)
"""New tasks come in several events: they are predicted together, so long after the first."""

FIRST_TASKS = 100
"""Tasks that are chosen to begin with, before any model: by then there will have been trainings."""

STILL_OPEN = timedelta(minutes=15)
"""Predictions of older versions are removed so long after the new ones are there: Label Studio
refuses to save what somebody began with a prediction that is gone by then."""


class TakenOver(Exception):
    """Another run has the job: this one was silent, and taken for dead."""


@dataclass(frozen=True, slots=True)
class Asked:
    """The answer to whoever asked for a job.

    Attributes:
        job: the job's id.
        state: its state.
        reason: in words.
        enqueue: whether it has just become due and must be handed to the queue.
    """

    job: int
    state: str
    reason: str
    enqueue: bool


class Jobs:
    """Creates jobs and moves them from state to state, each move one transaction."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self._database = database
        self._settings = settings

    def consider_training(
        self, project_id: int, *, trigger: str = "webhook", forced: bool = False
    ) -> Asked:
        """Decides what a project's training should do now, and makes the job say so.

        One training job of a project is active at a time. What changes while it runs leads to
        the next, since it counts as changed after the revision that the running one saw. One that
        was refused or failed is begun again when an annotation changes or somebody asks for it.
        """
        # Counted before the writing begins: meanwhile, webhooks must be able to write.
        with self._database.reading() as session:
            counted = _count(session, session.get_one(Project, project_id))
        with self._database.session() as session:
            # The row's lock: two workers must not both create the job.
            project = session.get_one(Project, project_id, with_for_update=True)
            if project.trained_revision != counted.trained_revision:
                counted = _count(session, project)
            job = _active_training(session, project_id)
            if job is not None and job.state == "running":
                return Asked(
                    job.id,
                    job.state,
                    f"a training is running already, at {job.progress:.0%}; "
                    "what changes meanwhile leads to the next one",
                    enqueue=False,
                )
            if job is not None and job.state == "queued":
                # One that was put off is begun at once where somebody asks.
                at_once = forced and job.not_before is not None
                if at_once:
                    job.not_before = None
                    job.heartbeat_at = now()
                return Asked(job.id, job.state, job.reason, enqueue=at_once)
            fruitless = _fruitless_training(session, project) if job is None else None
            if fruitless is not None and not forced:
                return Asked(fruitless.id, fruitless.state, fruitless.reason, enqueue=False)
            decision = decide(
                _situation(project, job, counted),
                moment=now(),
                every=self._settings.train_every,
                growth=self._settings.train_growth,
                minimum=self._settings.train_min,
                delay=self._settings.train_delay,
                forced=forced,
            )
            if job is None:
                job = Job(project_id=project_id, kind="train", trigger=trigger, payload={})
                session.add(job)
            if forced:
                job.trigger = trigger
            _follow(job, decision)
            session.flush()
            return Asked(job.id, job.state, job.reason, enqueue=job.state == "queued")

    def consider_autolabel(
        self, project_id: int, *, trigger: str = "promotion", forced: bool = False
    ) -> Asked | None:
        """Decides whether a project's tasks without an annotation must be predicted now.

        By itself that happens once for each live version, and again for tasks that have arrived
        since; before the first version, until enough are chosen to begin with. One such job of a
        project is active at a time; a running one sees at its next step that another version is
        live, and ends, and the next begins.

        Returns:
            The job; None where there is nothing to do.
        """
        with self._database.session() as session:
            # The row's lock: two workers must not both create the job.
            project = session.get_one(Project, project_id, with_for_update=True)
            before = _newest(session, project_id, "autolabel")
            if before is not None and before.state in ACTIVE:
                put_off = before.state == "queued" and before.not_before is not None
                # It waits for more tasks, unless somebody asks or a version has come.
                outdated = project.live_version is not None and before.version is None
                at_once = put_off and (forced or outdated)
                if outdated and put_off:
                    before.trigger = trigger
                    before.reason = f"{project.live_version} is live"
                if at_once:
                    before.not_before = None
                    before.heartbeat_at = now()
                return Asked(before.id, before.state, before.reason, enqueue=at_once)
            newest = before.payload.get("newest_task", 0) if before is not None else 0
            arrived = tasks_arrived(session, project_id, newest)
            chosen = before.payload.get("imported", 0) if before is not None else 0
            payload: dict[str, Any] = {"newest_task": arrived or newest}
            if project.live_version is None:
                payload |= {"version": UNTRAINED, "imported": chosen}
            not_before = None
            reason = f"asked for, with {project.version}"
            if not forced:
                version = project.live_version or UNTRAINED
                reason = f"{version} is live"
                if project.live_version is None:
                    if chosen >= FIRST_TASKS or (before is not None and not arrived):
                        return None
                    trigger = "tasks"
                    reason = "the first tasks are chosen, for how they differ"
                    not_before = now() + NEW_TASKS_DELAY
                elif before is not None and before.version == version:
                    if not arrived:
                        return None
                    trigger = "tasks"
                    reason = "new tasks have arrived"
                    not_before = now() + NEW_TASKS_DELAY
            job = Job(
                project_id=project_id,
                kind="autolabel",
                state="queued",
                trigger=trigger,
                reason=reason,
                version=project.live_version,
                payload=payload,
                not_before=not_before,
                heartbeat_at=now(),
            )
            session.add(job)
            session.flush()
            return Asked(job.id, job.state, job.reason, enqueue=not_before is None)

    def plan_tidying(self, project_id: int, versions: list[str]) -> int:
        """A job that removes predictions of older versions, once nobody works with them any more.

        Args:
            project_id: the project.
            versions: the versions whose predictions go.
        """
        at = now() + STILL_OPEN
        with self._database.session() as session:
            session.get_one(Project, project_id, with_for_update=True)
            job = _newest(session, project_id, "tidy")
            if job is None or job.state != "queued":
                job = Job(project_id=project_id, kind="tidy", state="queued", trigger="autolabel")
                session.add(job)
            job.payload = {"versions": versions}
            job.not_before = at
            job.heartbeat_at = now()
            job.reason = (
                f"predictions of older versions are removed at {at:%H:%M:%S} UTC: what somebody "
                "has open may have begun with one"
            )
            session.flush()
            return job.id

    def hand_over_predictions(self, project_id: int, tasks: list[dict[str, Any]]) -> int:
        """A job for tasks that a request left over: at its deadline, or because others ran."""
        with self._database.session() as session:
            job = Job(
                project_id=project_id,
                kind="predict",
                state="queued",
                trigger="predict",
                reason=f"{len(tasks)} tasks left over by a request for predictions",
                payload={"tasks": tasks},
                heartbeat_at=now(),
            )
            session.add(job)
            session.flush()
            return job.id

    def claim(self, job_id: int) -> Job | None:
        """Takes a queued job that is due; None where another worker has it or it is not due."""
        with self._database.session() as session:
            claimed = session.execute(
                update(Job)
                .where(
                    Job.id == job_id,
                    Job.state == "queued",
                    (Job.not_before.is_(None)) | (Job.not_before <= now()),
                )
                .values(
                    state="running",
                    attempt=Job.attempt + 1,
                    progress=0.0,
                    started_at=now(),
                    heartbeat_at=now(),
                    finished_at=None,
                )
                .returning(Job.id)
            ).scalar()
            return session.get_one(Job, job_id) if claimed is not None else None

    def beat(self, job_id: int) -> None:
        """Says that the worker of a running job lives."""
        self._change(job_id, heartbeat_at=now())

    def progress(self, job_id: int, fraction: float, reason: str) -> None:
        """Says how far a running job is."""
        self._change(job_id, progress=fraction, reason=reason, heartbeat_at=now())

    def advance(self, job: Job, fraction: float, reason: str, **values: Any) -> None:
        """Says how far a running job is; since it comes on, its attempts count anew.

        Args:
            job: the job, as it was claimed.
            fraction: of it that is done.
            reason: the same in words.
            values: other columns that are saved with it.

        Raises:
            TakenOver: it is this run's no more.
        """
        self.hold(job, progress=fraction, reason=reason, attempt=1, **values)

    def hold(self, job: Job, **values: Any) -> None:
        """Makes sure that a running job is still that of the run that claimed it.

        Args:
            job: the job, as it was claimed.
            values: columns that are saved if it is.

        Raises:
            TakenOver: it is this run's no more.
        """
        if not self._change_held(job, heartbeat_at=now(), **values):
            raise TakenOver

    def finish(self, job_id: int, state: str, reason: str, *, version: str | None = None) -> None:
        """Ends a job as `done`, `failed` or `refused`."""
        progress = {"progress": 1.0} if state == "done" else {}
        self._change(
            job_id, state=state, reason=reason, version=version, finished_at=now(), **progress
        )

    def try_again(self, job_id: int, why: str, *, wait: float, counts: bool = True) -> bool:
        """Puts a running job back, or fails it after too many attempts.

        One that has ended, or was put back already, stays as it is: a process may crash after its
        work is done.

        Args:
            job_id: the job.
            why: what went wrong, in words.
            wait: seconds before it may be claimed again.
            counts: whether the attempt counts; a stop of the worker is not the job's fault.

        Returns:
            Whether it was put back.
        """
        with self._database.reading() as session:
            job = session.get_one(Job, job_id)
        values = _again(job, why, wait=wait, counts=counts)
        return self._change_held(job, **values) and values["state"] == "queued"

    def due(self) -> list[tuple[int, str]]:
        """Id and kind of the queued jobs that are due and may not be in the queue any more."""
        with self._database.reading() as session:
            rows = session.execute(
                select(Job.id, Job.kind).where(
                    Job.state == "queued",
                    (Job.not_before.is_(None)) | (Job.not_before <= now()),
                    Job.heartbeat_at < now() - timedelta(seconds=10),
                )
            )
            return [(number, kind) for number, kind in rows]

    def touch(self, job_id: int) -> None:
        """Says that a queued job was handed to the queue just now."""
        self._change(job_id, heartbeat_at=now())

    def recover(self) -> list[int]:
        """Puts back the jobs whose worker died; answers their ids."""
        with self._database.session() as session:
            lost = session.scalars(
                select(Job)
                .where(Job.state == "running", Job.heartbeat_at < now() - STALE_AFTER)
                .with_for_update(skip_locked=True)
            ).all()
            for job in lost:
                values = _again(job, "its worker was stopped", wait=0, counts=True)
                session.execute(update(Job).where(Job.id == job.id).values(**values))
            return [job.id for job in lost]

    def get(self, job_id: int) -> Job | None:
        """One job."""
        with self._database.reading() as session:
            return session.get(Job, job_id)

    def waiting_until(self, project_id: int) -> datetime | None:
        """When the waiting training of a project is due, where its quiet time runs."""
        with self._database.reading() as session:
            job = _active_training(session, project_id)
            return job.not_before if job is not None and job.state == "waiting" else None

    def _change_held(self, job: Job, **values: Any) -> bool:
        """Changes a job if it runs still, and by the run that claimed it."""
        return bool(
            self._database.change(
                update(Job)
                .where(Job.id == job.id, Job.state == "running", Job.started_at == job.started_at)
                .values(**values)
            )
        )

    def _change(self, job_id: int, **values: Any) -> None:
        self._database.change(update(Job).where(Job.id == job_id).values(**values))


@dataclass(frozen=True, slots=True)
class _Counted:
    """What a decision about a training counts.

    Attributes:
        trained_revision: the project's revision that the newest training saw.
        annotated: tasks with an annotation to learn from.
        changes: annotations new or changed since that revision.
    """

    trained_revision: int
    annotated: int
    changes: int


def _count(session: Session, project: Project) -> _Counted:
    return _Counted(
        project.trained_revision,
        annotated_tasks(session, project.id),
        changes_since(session, project.id, project.trained_revision),
    )


def _situation(project: Project, job: Job | None, counted: _Counted) -> Situation:
    enough = job.payload.get("enough_since") if job is not None else None
    return Situation(
        annotated=counted.annotated,
        changes=counted.changes,
        last_change=project.changed_at,
        enough_since=datetime.fromisoformat(enough) if enough else None,
        trained_before=counted.trained_revision > 0,
    )


def tasks_arrived(session: Session, project_id: int, since: int) -> int | None:
    """Row of the newest task without an annotation among those heard of after row `since`."""
    annotated = (
        select(Annotation.id)
        .where(Annotation.project_id == project_id, Annotation.task_id == Task.label_studio_id)
        .exists()
    )
    return session.scalar(
        select(Task.id)
        .where(
            Task.project_id == project_id,
            Task.id > since,
            Task.deleted_at.is_(None),
            ~annotated,
        )
        .order_by(Task.id.desc())
        .limit(1)
    )


def _newest(session: Session, project_id: int, kind: str) -> Job | None:
    return session.scalar(
        select(Job)
        .where(Job.project_id == project_id, Job.kind == kind)
        .order_by(Job.id.desc())
        .limit(1)
    )


def _active_training(session: Session, project_id: int) -> Job | None:
    return session.scalar(
        select(Job)
        .where(Job.project_id == project_id, Job.kind == "train", Job.state.in_(ACTIVE))
        .order_by(Job.id.desc())
    )


def _fruitless_training(session: Session, project: Project) -> Job | None:
    """The newest training, where it came to nothing and no annotation has changed since.

    Begun again by itself it would come to nothing again, for ever.
    """
    job = session.scalar(
        select(Job)
        .where(Job.project_id == project.id, Job.kind == "train")
        .order_by(Job.id.desc())
        .limit(1)
    )
    if job is None or job.state not in ("refused", "failed") or job.started_at is None:
        return None
    changed = project.changed_at is not None and project.changed_at > job.started_at
    return None if changed else job


def _follow(job: Job, decision: Decision) -> None:
    job.reason = decision.reason
    job.not_before = decision.at
    job.heartbeat_at = now()
    match decision.action:
        case "start":
            job.state = "queued"
            job.not_before = None
        case "refuse":
            job.state = "refused"
            job.finished_at = now()
        case "pause":
            job.state = "waiting"
            job.payload = {
                **job.payload,
                "enough_since": job.payload.get("enough_since") or now().isoformat(),
            }
        case "wait":
            job.state = "waiting"
            job.payload = {k: v for k, v in job.payload.items() if k != "enough_since"}


def _again(job: Job, why: str, *, wait: float, counts: bool) -> dict[str, Any]:
    """What a job becomes that is put back, or fails after too many attempts."""
    attempt = job.attempt if counts else job.attempt - 1
    if attempt >= ATTEMPTS:
        return {
            "attempt": attempt,
            "state": "failed",
            "reason": f"failed after {attempt} attempts: {why}",
            "finished_at": now(),
        }
    return {
        "attempt": attempt,
        "state": "queued",
        "reason": f"{why}; tried again (attempt {attempt + 1} of {ATTEMPTS})",
        "not_before": now() + timedelta(seconds=wait),
        "heartbeat_at": now(),
    }
