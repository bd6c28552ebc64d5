"""Asking for jobs: decides whether one is needed, writes its row, and puts it into the queue."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from ml_backend.jobs.jobs import Asked
from ml_backend.jobs.payloads import (
    AutolabelCheckpoint,
    DeferredPayload,
    StalePayload,
    TrainCheckpoint,
)
from ml_backend.jobs.queue import Queue
from ml_backend.jobs.schedule import FEWEST, Action, Decision, Situation, decide
from ml_backend.projects.counts import annotated_tasks, changes_since
from ml_backend.reasons import Code, reason
from ml_backend.settings import Settings
from ml_backend.store.database import Database
from ml_backend.store.states import ACTIVE, JobKind, JobState, Trigger
from ml_backend.store.tables import UNTRAINED, Annotation, Job, Project, Task, now

NEW_TASKS_DELAY = timedelta(seconds=10)
"""New tasks come in several events: they are predicted together, so long after the first."""

FIRST_TASKS = 100
"""Tasks that are chosen to begin with, before any model: by then there will have been trainings."""

STILL_OPEN = timedelta(minutes=15)
"""Predictions of older versions are removed so long after the new ones are there: Label Studio
refuses to save an annotation that was begun with a prediction that is gone by then."""


class Requests:
    """Asks for jobs.

    Args:
        database: projects and their jobs.
        queue: receives the jobs.
        settings: when a training is due.
    """

    def __init__(self, database: Database, queue: Queue, settings: Settings) -> None:
        self._database = database
        self._queue = queue
        self._settings = settings
        # Later it would happen in a transaction, while others wait to write.
        queue.open()

    def training(
        self,
        project_id: int,
        *,
        trigger: Trigger = Trigger.WEBHOOK,
        forced: bool = False,
        is_read_back: bool = False,
    ) -> Asked:
        """Decides what a project's training should do now, and makes its job say so.

        One training of a project is active at a time. Changes that arrive while it runs lead to
        the next one, since they are newer than the revision that it saw. A training that was
        refused or failed begins again when an annotation changes or somebody asks for it.

        Args:
            project_id: the project.
            trigger: what asks.
            forced: somebody asked for it: it starts at once. Where too few annotations are known
                and Label Studio can be asked for more, the training reads them back and decides.
            is_read_back: whether the annotations were read back just now.
        """
        # Counted before the writing begins, so that webhooks can be stored meanwhile.
        with self._database.reading() as session:
            counted = _count(session, session.get_one(Project, project_id))
        with self._database.session() as session:
            # The row's lock: two workers must not both create the job.
            project = session.get_one(Project, project_id, with_for_update=True)
            if project.trained_revision != counted.trained_revision:
                counted = _count(session, project)
            job = _active(session, project_id, JobKind.TRAIN)
            if job is not None and job.state == JobState.RUNNING:
                why = reason(Code.TRAINING_RUNS, progress=job.progress)
                return Asked(job.id, job.state, why)
            if job is not None and job.state == JobState.QUEUED:
                # A training that was put off begins at once where somebody asks.
                if forced and job.not_before is not None:
                    job.not_before = None
                    self._queue.put(session, job)
                return Asked.of(job)
            fruitless = _fruitless_training(session, project) if job is None else None
            if fruitless is not None and not forced:
                return Asked.of(fruitless)
            may_be_more = not is_read_back and self._can_read_back(project)
            decision = self._decide(project, job, counted, forced, may_be_more)
            if job is None:
                job = Job(project_id=project_id, kind=JobKind.TRAIN, trigger=trigger, checkpoint={})
                session.add(job)
            if forced:
                job.trigger = trigger
            _follow(job, decision)
            session.flush()
            if job.state == JobState.QUEUED:
                self._queue.put(session, job)
            return Asked.of(job)

    def autolabel(
        self, project_id: int, *, trigger: Trigger = Trigger.PROMOTION, forced: bool = False
    ) -> Asked | None:
        """Decides whether a project's tasks without an annotation must be predicted now.

        Without being asked, that happens once for each live version and again for tasks that have
        arrived since; before the first version, until enough tasks are chosen to begin with. One
        such job of a project is active at a time; a running one ends as soon as another version is
        live, and the next one begins.

        Returns:
            The job; None where there is nothing to do.
        """
        with self._database.session() as session:
            # The row's lock: two workers must not both create the job.
            project = session.get_one(Project, project_id, with_for_update=True)
            before = _newest(session, project_id, JobKind.AUTOLABEL)
            if before is not None and before.state in ACTIVE:
                return self._hasten(session, project, before, trigger, forced)
            reached = AutolabelCheckpoint.model_validate(before.checkpoint if before else {})
            arrived = tasks_arrived(session, project_id, reached.newest_task)
            checkpoint = AutolabelCheckpoint(newest_task=arrived or reached.newest_task)
            if project.live_version is None:
                checkpoint.version, checkpoint.imported = UNTRAINED, reached.imported
            job = Job(
                project_id=project_id,
                kind=JobKind.AUTOLABEL,
                state=JobState.QUEUED,
                trigger=trigger,
                reason=reason(Code.ASKED_FOR_WITH_VERSION, version=project.version),
                version=project.live_version,
                checkpoint=checkpoint.stored(),
            )
            wait = 0.0
            if not forced:
                job.reason = reason(Code.VERSION_IS_LIVE, version=project.version)
                if project.live_version is None:
                    if reached.imported >= FIRST_TASKS or (before is not None and not arrived):
                        return None
                    job.trigger = Trigger.TASKS
                    job.reason = reason(Code.FIRST_TASKS)
                    wait = NEW_TASKS_DELAY.total_seconds()
                elif before is not None and before.version == project.live_version:
                    if not arrived:
                        return None
                    job.trigger = Trigger.TASKS
                    job.reason = reason(Code.TASKS_ARRIVED)
                    wait = NEW_TASKS_DELAY.total_seconds()
            job.not_before = now() + timedelta(seconds=wait) if wait else None
            session.add(job)
            session.flush()
            self._queue.put(session, job, wait=wait)
            return Asked.of(job)

    def deferred_predictions(self, project_id: int, tasks: list[dict[str, Any]]) -> int:
        """Asks for the tasks that a request for predictions did not finish; answers the job."""
        with self._database.session() as session:
            job = Job(
                project_id=project_id,
                kind=JobKind.PREDICT,
                state=JobState.QUEUED,
                trigger=Trigger.PREDICT,
                reason=reason(Code.REQUEST_LEFT_TASKS, tasks=len(tasks)),
                payload=DeferredPayload(tasks=tasks).stored(),
            )
            session.add(job)
            session.flush()
            self._queue.put(session, job)
            return job.id

    def stale_removal(self, session: Session, project_id: int, versions: list[str]) -> int:
        """Asks for the removal of older versions' predictions, once nobody works with them.

        Args:
            session: the transaction that writes the job.
            project_id: the project.
            versions: the versions whose predictions go.

        Returns:
            The job.
        """
        at = now() + STILL_OPEN
        session.get_one(Project, project_id, with_for_update=True)
        job = _newest(session, project_id, JobKind.REMOVE_STALE)
        if job is None or job.state != JobState.QUEUED:
            job = Job(
                project_id=project_id,
                kind=JobKind.REMOVE_STALE,
                state=JobState.QUEUED,
                trigger=Trigger.AUTOLABEL,
            )
            session.add(job)
        job.payload = StalePayload(versions=versions).stored()
        job.not_before = at
        job.reason = reason(Code.STALE_REMOVAL_PLANNED, at=at.isoformat())
        session.flush()
        self._queue.put(session, job, wait=STILL_OPEN.total_seconds())
        return job.id

    def waiting_training(self, project_id: int) -> Job | None:
        """A project's training that waits, if there is one."""
        with self._database.reading() as session:
            job = _active(session, project_id, JobKind.TRAIN, locked=False)
            return job if job is not None and job.state == JobState.WAITING else None

    def _decide(
        self,
        project: Project,
        job: Job | None,
        counted: _Counted,
        forced: bool,
        may_be_more: bool,
    ) -> Decision:
        situation = Situation(
            annotated=counted.annotated,
            changes=counted.changes,
            last_change=project.changed_at,
            enough_since=_enough_since(job),
            trained_before=counted.trained_revision > 0,
        )
        if forced and counted.annotated < FEWEST and may_be_more:
            # Annotated before it was connected, or by an import: the training reads back first.
            return Decision(Action.START, reason(Code.ASKED_FOR, annotated=counted.annotated))
        return decide(
            situation,
            moment=now(),
            every=self._settings.train_every,
            growth=self._settings.train_growth,
            minimum=self._settings.train_min,
            delay=self._settings.train_delay,
            forced=forced,
        )

    def _can_read_back(self, project: Project) -> bool:
        """Whether a token for the project's Label Studio is known; asks nobody."""
        if project.url and project.token:
            return True
        named = self._settings.label_studio_url and self._settings.label_studio_api_key
        return bool(named) and project.is_default is not False

    def _hasten(
        self, session: Session, project: Project, job: Job, trigger: Trigger, forced: bool
    ) -> Asked:
        """Lets an auto-labelling that waits for more tasks begin, where somebody asks for it or a
        version has gone live."""
        put_off = job.state == JobState.QUEUED and job.not_before is not None
        outdated = project.live_version is not None and job.version is None
        if outdated and put_off:
            job.trigger = trigger
            job.reason = reason(Code.VERSION_IS_LIVE, version=project.version)
        if put_off and (forced or outdated):
            job.not_before = None
            self._queue.put(session, job)
        return Asked.of(job)


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


def tasks_arrived(session: Session, project_id: int, since: int) -> int | None:
    """Finds the newest task without an annotation among those heard of after row `since`.

    Returns:
        The task's row; None where there is none.
    """
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


def _newest(session: Session, project_id: int, kind: JobKind) -> Job | None:
    return session.scalar(
        select(Job)
        .where(Job.project_id == project_id, Job.kind == kind)
        .order_by(Job.id.desc())
        .limit(1)
        .with_for_update()
    )


def _active(session: Session, project_id: int, kind: JobKind, *, locked: bool = True) -> Job | None:
    job = (
        select(Job)
        .where(Job.project_id == project_id, Job.kind == kind, Job.state.in_(ACTIVE))
        .order_by(Job.id.desc())
        .limit(1)
    )
    # A worker may claim the job just now.
    return session.scalar(job.with_for_update() if locked else job)


def _fruitless_training(session: Session, project: Project) -> Job | None:
    """The newest training, where it came to nothing and no annotation has changed since.

    Begun again by itself it would come to nothing again, for ever.
    """
    job = _newest(session, project.id, JobKind.TRAIN)
    if (
        job is None
        or job.state not in (JobState.REFUSED, JobState.FAILED)
        or job.started_at is None
    ):
        return None
    changed = project.changed_at is not None and project.changed_at > job.started_at
    return None if changed else job


def _enough_since(job: Job | None) -> Any:
    return TrainCheckpoint.model_validate(job.checkpoint if job else {}).enough_since


def _follow(job: Job, decision: Decision) -> None:
    """Makes a training's row say what was decided."""
    job.reason = decision.reason
    job.not_before = decision.at
    match decision.action:
        case Action.START:
            job.state = JobState.QUEUED
            job.not_before = None
        case Action.REFUSE:
            job.state = JobState.REFUSED
            job.finished_at = now()
        case Action.PAUSE:
            job.state = JobState.WAITING
            since = _enough_since(job) or now()
            job.checkpoint = TrainCheckpoint(enough_since=since).stored()
        case Action.WAIT:
            job.state = JobState.WAITING
            job.checkpoint = TrainCheckpoint().stored()
