"""Jobs: one training at a time, said in words, and none lost with the worker that had it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import select, update

from ml_backend.jobs.jobs import (
    ATTEMPTS,
    FIRST_TASKS,
    STALE_AFTER,
    STILL_OPEN,
    Asked,
    Jobs,
    TakenOver,
)
from ml_backend.jobs.schedule import PATIENCE
from ml_backend.label_studio.events import (
    AnnotationInfo,
    AnnotationsChanged,
    ProjectInfo,
    TaskInfo,
    TasksChanged,
)
from ml_backend.projects.ingest import Ingest
from ml_backend.settings import load_settings
from ml_backend.store.artefacts import ArtefactStore
from ml_backend.store.database import Database
from ml_backend.store.tables import Job, Project, now
from ml_backend.training.promotion import Verdict, Versions

START = datetime(2026, 1, 1, tzinfo=UTC)
PROJECT = ProjectInfo("7.1795463889", 7, "cells", "<View/>", None, None)


class Loop:
    """A project, its annotations and its jobs."""

    def __init__(self, url: str, folder: Path, **settings: str) -> None:
        self.database = Database(url)
        self.database.migrate()
        self.ingest = Ingest(self.database)
        self.versions = Versions(self.database, ArtefactStore(folder))
        chosen = {
            "MODEL_DIR": str(folder),
            "ML_BACKEND_TRAIN_MIN": "10",
            "ML_BACKEND_TRAIN_EVERY": "5",
            "ML_BACKEND_TRAIN_DELAY": "0",
            **settings,
        }
        self.jobs = Jobs(self.database, load_settings(chosen))
        self.project_id = self.ingest.introduce(PROJECT.key, 7, label_config="<View/>").id

    def annotate(self, numbers: range) -> None:
        """Annotates tasks of these numbers, anew where that was done."""
        moment = now()
        for n in numbers:
            annotation = AnnotationInfo(n, n, [], False, False, None, None, 1, START, moment)
            event = AnnotationsChanged(PROJECT, (annotation,), (TaskInfo(n, {}, START),))
            self.ingest.apply(event, PROJECT)

    def project(self) -> Project:
        """The project's row."""
        with self.database.reading() as session:
            return session.get_one(Project, self.project_id)

    def ask(self, *, forced: bool = False) -> Asked:
        """Considers a training; by the button, where forced."""
        if forced:
            return self.jobs.consider_training(self.project_id, trigger="button", forced=True)
        return self.jobs.consider_training(self.project_id)

    def started(self) -> int:
        """A training that runs."""
        if self.project().revision == 0:
            self.annotate(range(1, 11))
        asked = self.ask()
        assert asked.enqueue
        assert self.jobs.claim(asked.job) is not None
        return asked.job

    def job(self, number: int) -> Job:
        """A job that must be there."""
        job = self.jobs.get(number)
        assert job is not None
        return job

    def all(self) -> list[Job]:
        """All jobs, oldest first."""
        with self.database.reading() as session:
            return list(session.scalars(select(Job).order_by(Job.id)))

    def promoted(self, name: str) -> None:
        """Enters a version and makes it live."""
        verdict = Verdict(True, "promoted")
        live = self.project().live_version
        self.versions.record(self.project_id, name, {}, verdict, parent=live, revision=0)

    def trained(self, name: str, revision: int) -> None:
        """Enters a version that saw the annotations up to a revision."""
        verdict = Verdict(False, "not promoted")
        self.versions.record(self.project_id, name, {}, verdict, parent=None, revision=revision)

    def silent_for(self, number: int, duration: timedelta) -> None:
        """Lets a job's last heartbeat lie back."""
        with self.database.session() as session:
            session.execute(
                update(Job).where(Job.id == number).values(heartbeat_at=now() - duration)
            )

    def enough_for(self, number: int, seconds: float) -> None:
        """Lets the moment from which a waiting job had enough changes lie further back."""
        payload = self.job(number).payload
        since = datetime.fromisoformat(payload["enough_since"]) - timedelta(seconds=seconds)
        with self.database.session() as session:
            session.execute(
                update(Job)
                .where(Job.id == number)
                .values(payload={**payload, "enough_since": since.isoformat()})
            )


@pytest.fixture
def loop(database_url: str, tmp_path: Path) -> Iterator[Loop]:
    """A loop without a quiet time."""
    loop = Loop(database_url, tmp_path)
    yield loop
    loop.database.close()


@pytest.fixture
def patient_loop(database_url: str, tmp_path: Path) -> Iterator[Loop]:
    """A loop with a quiet time of ten minutes."""
    loop = Loop(database_url, tmp_path, ML_BACKEND_TRAIN_DELAY="600")
    yield loop
    loop.database.close()


def test_it_says_how_many_tasks_are_missing_and_keeps_one_job(loop: Loop) -> None:
    loop.annotate(range(1, 3))
    first = loop.ask()
    assert (first.state, first.enqueue) == ("waiting", False)
    assert "waiting for 8 more annotated tasks" in first.reason
    loop.annotate(range(3, 10))
    second = loop.ask()
    assert second.job == first.job
    assert "waiting for 1 more annotated task " in second.reason
    assert loop.job(first.job).reason == second.reason


def test_a_waiting_training_is_queued_once_there_is_enough(loop: Loop) -> None:
    loop.annotate(range(1, 10))
    waiting = loop.ask()
    loop.annotate(range(10, 11))
    due = loop.ask()
    assert (due.job, due.state, due.enqueue) == (waiting.job, "queued", True)
    assert due.reason == "10 new or changed annotations, 10 annotated tasks"
    again = loop.ask()
    assert (again.job, again.state, again.enqueue) == (due.job, "queued", False)
    assert again.reason == due.reason


def test_the_quiet_time_is_waited_for(patient_loop: Loop) -> None:
    patient_loop.annotate(range(1, 11))
    asked = patient_loop.ask()
    assert (asked.state, asked.enqueue) == ("waiting", False)
    until = patient_loop.jobs.waiting_until(patient_loop.project_id)
    assert until is not None
    at = until.astimezone(UTC)
    assert asked.reason.startswith(f"quiet time: starts at {at:%H:%M:%S} UTC")
    changed = patient_loop.project().changed_at
    assert changed is not None
    assert until == changed + timedelta(seconds=600)
    # One more annotation begins it anew.
    patient_loop.annotate(range(11, 12))
    assert patient_loop.ask().job == asked.job
    later = patient_loop.jobs.waiting_until(patient_loop.project_id)
    assert later is not None
    assert later > until
    with patient_loop.database.session() as session:
        session.execute(update(Project).values(changed_at=now() - timedelta(seconds=601)))
    due = patient_loop.ask()
    assert (due.job, due.state, due.enqueue) == (asked.job, "queued", True)
    assert patient_loop.jobs.waiting_until(patient_loop.project_id) is None


def test_annotators_who_never_pause_get_their_training_all_the_same(patient_loop: Loop) -> None:
    patient_loop.annotate(range(1, 11))
    number = patient_loop.ask().job
    for passed in (PATIENCE * 300, PATIENCE * 300 + 1):
        assert patient_loop.job(number).state == "waiting"
        patient_loop.annotate(range(11, 12))
        patient_loop.enough_for(number, passed)
        patient_loop.ask()
    assert patient_loop.job(number).state == "queued"


def test_the_button_does_not_wait_for_the_quiet_time(patient_loop: Loop) -> None:
    patient_loop.annotate(range(1, 4))
    waiting = patient_loop.ask()
    pressed = patient_loop.ask(forced=True)
    assert (pressed.job, pressed.state, pressed.enqueue) == (waiting.job, "queued", True)
    assert pressed.reason == "asked for, with 3 annotated tasks"
    assert patient_loop.job(pressed.job).trigger == "button"
    assert patient_loop.jobs.claim(pressed.job) is not None


def test_while_one_runs_it_says_how_far_it_is(loop: Loop) -> None:
    running = loop.started()
    loop.jobs.progress(running, 0.4, "epoch 3 of 7")
    for forced in (False, True):
        asked = loop.ask(forced=forced)
        assert (asked.job, asked.state, asked.enqueue) == (running, "running", False)
        assert asked.reason.startswith("a training is running already, at 40%")
    assert loop.job(running).reason == "epoch 3 of 7"


def test_with_nothing_to_learn_from_the_button_is_refused_in_words(loop: Loop) -> None:
    loop.annotate(range(1, 2))
    asked = loop.ask(forced=True)
    assert (asked.state, asked.enqueue) == ("refused", False)
    assert "at least 2 annotated tasks and there is 1" in asked.reason
    assert loop.job(asked.job).finished_at is not None
    # The refusal ends that job, and the next request is a new one.
    loop.annotate(range(2, 3))
    again = loop.ask(forced=True)
    assert again.job != asked.job
    assert again.state == "queued"


@pytest.mark.parametrize("forced", [False, True])
def test_eight_threads_that_ask_at_once_get_one_job(loop: Loop, forced: bool) -> None:
    loop.annotate(range(1, 11))
    with ThreadPoolExecutor(8) as pool:
        asked = [f.result() for f in [pool.submit(loop.ask, forced=forced) for _ in range(24)]]
    assert len({a.job for a in asked}) == 1
    assert sum(a.enqueue for a in asked) == 1
    assert [job.state for job in loop.all()] == ["queued"]


def test_projects_have_a_training_each(loop: Loop) -> None:
    first = loop.started()
    other = ProjectInfo("8.1795463889", 8, "others", "<View/>", None, None)
    number = loop.ingest.introduce(other.key, 8, label_config="<View/>").id
    for n in range(1, 3):
        annotation = AnnotationInfo(n, n, [], False, False, None, None, 1, START, START)
        event = AnnotationsChanged(other, (annotation,), (TaskInfo(n, {}, START),))
        loop.ingest.apply(event, other)
    asked = loop.jobs.consider_training(number, forced=True)
    assert asked.job != first
    assert asked.enqueue


def test_what_changes_during_a_training_leads_to_the_next(loop: Loop) -> None:
    running = loop.started()
    seen = loop.project().revision
    loop.annotate(range(11, 16))
    loop.trained("v1", seen)
    loop.jobs.finish(running, "done", "promoted", version="v1")
    following = loop.ask()
    assert following.job != running
    assert (following.state, following.enqueue) == ("queued", True)
    assert following.reason == "5 new or changed annotations, 15 annotated tasks"
    done = loop.job(running)
    assert (done.state, done.version, done.progress) == ("done", "v1", 1.0)


def test_after_a_training_that_saw_all_the_next_waits_for_changes(loop: Loop) -> None:
    running = loop.started()
    loop.trained("v1", loop.project().revision)
    loop.jobs.finish(running, "done", "promoted", version="v1")
    loop.annotate(range(1, 3))
    asked = loop.ask()
    assert asked.state == "waiting"
    assert "waiting for 3 more new or changed annotations (2 of 5)" in asked.reason


@pytest.mark.parametrize("end", ["refused", "failed"])
def test_a_training_that_could_not_be_is_not_begun_again_until_something_changes(
    loop: Loop, end: str
) -> None:
    running = loop.started()
    loop.jobs.finish(running, end, "no image can be read")
    asked = loop.ask()
    assert (asked.job, asked.state, asked.enqueue) == (running, end, False)
    assert asked.reason == "no image can be read"
    assert len(loop.all()) == 1
    loop.annotate(range(1, 2))
    following = loop.ask()
    assert following.job != running
    assert following.enqueue


@pytest.mark.parametrize("end", ["refused", "failed"])
def test_a_training_that_could_not_be_can_be_asked_for_again(loop: Loop, end: str) -> None:
    running = loop.started()
    loop.jobs.finish(running, end, "no image can be read")
    asked = loop.ask(forced=True)
    assert asked.job != running
    assert asked.enqueue


def test_a_job_is_claimed_by_one_worker_only(loop: Loop) -> None:
    loop.annotate(range(1, 11))
    number = loop.ask().job
    with ThreadPoolExecutor(8) as pool:
        claimed = list(pool.map(lambda _: loop.jobs.claim(number), range(24)))
    won = [job for job in claimed if job is not None]
    assert [job.id for job in won] == [number]
    assert (won[0].state, won[0].attempt) == ("running", 1)
    assert loop.job(number).attempt == 1


def test_a_waiting_or_ended_job_cannot_be_claimed(loop: Loop) -> None:
    loop.annotate(range(1, 3))
    waiting = loop.ask().job
    assert loop.jobs.claim(waiting) is None
    loop.ask(forced=True)
    assert loop.jobs.claim(waiting) is not None
    loop.jobs.finish(waiting, "done", "promoted")
    assert loop.jobs.claim(waiting) is None
    assert loop.jobs.claim(12345) is None


def test_a_job_that_was_put_back_is_claimed_when_its_wait_is_over(loop: Loop) -> None:
    number = loop.started()
    assert loop.jobs.try_again(number, "the training crashed", wait=3600)
    job = loop.job(number)
    assert job.state == "queued"
    assert job.reason == f"the training crashed; tried again (attempt 2 of {ATTEMPTS})"
    loop.silent_for(number, timedelta(minutes=1))
    assert loop.jobs.claim(number) is None
    assert loop.jobs.due() == []
    with loop.database.session() as session:
        session.execute(update(Job).values(not_before=now() - timedelta(seconds=1)))
    assert loop.jobs.due() == [(number, "train")]
    claimed = loop.jobs.claim(number)
    assert claimed is not None
    assert claimed.attempt == 2


def test_a_job_handed_to_the_queue_just_now_is_not_handed_out_again(loop: Loop) -> None:
    loop.annotate(range(1, 11))
    number = loop.ask().job
    assert loop.jobs.due() == []
    loop.silent_for(number, timedelta(minutes=1))
    assert loop.jobs.due() == [(number, "train")]
    loop.jobs.touch(number)
    assert loop.jobs.due() == []


def test_a_running_job_that_went_silent_is_put_back(loop: Loop) -> None:
    number = loop.started()
    loop.silent_for(number, STALE_AFTER + timedelta(seconds=1))
    assert loop.jobs.recover() == [number]
    job = loop.job(number)
    assert job.state == "queued"
    assert job.reason == f"its worker was stopped; tried again (attempt 2 of {ATTEMPTS})"
    assert loop.jobs.recover() == []
    claimed = loop.jobs.claim(number)
    assert claimed is not None
    assert (claimed.attempt, claimed.progress) == (2, 0.0)


def test_a_running_job_whose_heart_beats_is_left_alone(loop: Loop) -> None:
    number = loop.started()
    assert loop.jobs.recover() == []
    loop.silent_for(number, STALE_AFTER + timedelta(seconds=1))
    loop.jobs.beat(number)
    assert loop.jobs.recover() == []
    loop.silent_for(number, STALE_AFTER + timedelta(seconds=1))
    loop.jobs.progress(number, 0.2, "epoch 1 of 5")
    assert loop.jobs.recover() == []
    assert loop.job(number).state == "running"


def test_a_job_whose_workers_keep_dying_fails_in_the_end(loop: Loop) -> None:
    number = loop.started()
    for attempt in range(1, ATTEMPTS + 1):
        assert loop.job(number).attempt == attempt
        loop.silent_for(number, STALE_AFTER + timedelta(seconds=1))
        loop.jobs.recover()
        if attempt < ATTEMPTS:
            assert loop.jobs.claim(number) is not None
    job = loop.job(number)
    assert job.state == "failed"
    assert job.reason == f"failed after {ATTEMPTS} attempts: its worker was stopped"
    assert job.finished_at is not None
    assert loop.jobs.claim(number) is None
    assert loop.jobs.recover() == []


def test_a_job_that_keeps_crashing_fails_in_the_end(loop: Loop) -> None:
    number = loop.started()
    for _ in range(1, ATTEMPTS):
        assert loop.jobs.try_again(number, "the training crashed", wait=0)
        assert loop.jobs.claim(number) is not None
    assert not loop.jobs.try_again(number, "the training crashed", wait=0)
    assert loop.job(number).reason == f"failed after {ATTEMPTS} attempts: the training crashed"


@pytest.mark.parametrize("end", ["done", "refused", "failed"])
def test_a_job_that_has_ended_is_not_tried_again(loop: Loop, end: str) -> None:
    number = loop.started()
    loop.jobs.finish(number, end, "so it ended")
    # Its process crashed on its way out.
    for counts in (True, False):
        assert not loop.jobs.try_again(number, "it crashed", wait=0, counts=counts)
    job = loop.job(number)
    assert (job.state, job.reason, job.attempt) == (end, "so it ended", 1)
    assert loop.jobs.claim(number) is None


def test_a_stop_of_the_worker_does_not_count(loop: Loop) -> None:
    number = loop.started()
    for _ in range(2 * ATTEMPTS):
        assert loop.jobs.try_again(number, "the worker was stopped", wait=0, counts=False)
        claimed = loop.jobs.claim(number)
        assert claimed is not None
        assert claimed.attempt == 1
    assert loop.job(number).state == "running"


def test_tasks_left_over_by_a_request_wait_for_a_worker(loop: Loop) -> None:
    tasks = [{"id": 1, "data": {"image": "/data/1.png"}}, {"id": 2, "data": {}}]
    number = loop.jobs.hand_over_predictions(loop.project_id, tasks)
    loop.silent_for(number, timedelta(minutes=1))
    assert loop.jobs.due() == [(number, "predict")]
    job = loop.jobs.claim(number)
    assert job is not None
    assert job.payload == {"tasks": tasks}
    assert job.reason.startswith("2 tasks left over")
    # Predictions do not stand in a training's way.
    loop.annotate(range(1, 11))
    assert loop.ask().enqueue


def test_the_rest_is_labelled_once_for_each_live_version(loop: Loop) -> None:
    # Before any version, the first tasks are chosen, once they are all there.
    first = loop.jobs.consider_autolabel(loop.project_id)
    assert first is not None
    assert (first.state, first.enqueue) == ("queued", False)
    assert first.reason == "the first tasks are chosen, for how they differ"
    loop.promoted("v1")
    asked = loop.jobs.consider_autolabel(loop.project_id)
    assert asked is not None
    assert (asked.job, asked.state, asked.enqueue) == (first.job, "queued", True)
    assert asked.reason == "v1 is live"
    again = loop.jobs.consider_autolabel(loop.project_id)
    assert again is not None
    assert (again.job, again.enqueue) == (asked.job, False)
    assert loop.jobs.claim(asked.job) is not None
    # While it runs, a promotion waits for its end.
    loop.promoted("v2")
    running = loop.jobs.consider_autolabel(loop.project_id)
    assert running is not None
    assert (running.job, running.enqueue) == (asked.job, False)
    loop.jobs.finish(asked.job, "done", "superseded by v2", version="v1")
    following = loop.jobs.consider_autolabel(loop.project_id)
    assert following is not None
    assert following.enqueue
    for state in ("done", "failed", "refused"):
        loop.jobs.finish(following.job, state, "so it ended", version="v2")
        assert loop.jobs.consider_autolabel(loop.project_id) is None
    asked_for = loop.jobs.consider_autolabel(loop.project_id, trigger="command", forced=True)
    assert asked_for is not None
    assert asked_for.reason == "asked for, with v2"


def test_enough_tasks_to_begin_with_are_chosen_once(loop: Loop) -> None:
    first = loop.jobs.consider_autolabel(loop.project_id)
    assert first is not None
    for imported in (40, FIRST_TASKS):
        with loop.database.session() as session:
            session.execute(update(Job).values(not_before=now() - timedelta(seconds=1)))
        claimed = loop.jobs.claim(first.job)
        assert claimed is not None
        payload = {**claimed.payload, "imported": imported}
        loop.jobs.advance(claimed, 1.0, "chosen", payload=payload, version="untrained")
        loop.jobs.finish(first.job, "done", "chosen", version="untrained")
        assert loop.jobs.consider_autolabel(loop.project_id) is None
        # More tasks: as long as there are too few, they may be chosen as well.
        loop.ingest.apply(TasksChanged(PROJECT, (TaskInfo(imported, {}, START),)), PROJECT)
        following = loop.jobs.consider_autolabel(loop.project_id)
        assert (following is None) == (imported == FIRST_TASKS)
        first = following or first


def test_the_rest_is_labelled_again_when_tasks_arrive(loop: Loop) -> None:
    loop.promoted("v1")
    first = loop.jobs.consider_autolabel(loop.project_id)
    assert first is not None
    loop.jobs.finish(first.job, "done", "all predicted", version="v1")
    # A task that was heard of with its annotation is none to predict.
    loop.annotate(range(1, 3))
    assert loop.jobs.consider_autolabel(loop.project_id) is None
    loop.ingest.apply(TasksChanged(PROJECT, (TaskInfo(3, {}, START),)), PROJECT)
    arrived = loop.jobs.consider_autolabel(loop.project_id)
    assert arrived is not None
    job = loop.job(arrived.job)
    assert (job.trigger, job.reason) == ("tasks", "new tasks have arrived")
    # They come in several events, so it waits a little, unless somebody asks.
    assert not arrived.enqueue
    assert loop.jobs.claim(job.id) is None
    asked = loop.jobs.consider_autolabel(loop.project_id, forced=True)
    assert asked is not None
    assert (asked.job, asked.enqueue) == (job.id, True)
    loop.jobs.finish(job.id, "done", "all predicted", version="v1")
    assert loop.jobs.consider_autolabel(loop.project_id) is None


def test_a_job_that_comes_on_does_not_fail_however_often_it_is_interrupted(loop: Loop) -> None:
    number = loop.started()
    for step in range(1, 2 * ATTEMPTS):
        job = loop.job(number)
        loop.jobs.advance(job, step / 10, f"{step} of 10", payload={"cursor": step})
        assert loop.jobs.try_again(number, "it was killed", wait=0)
        claimed = loop.jobs.claim(number)
        assert claimed is not None
        assert (claimed.attempt, claimed.payload) == (2, {"cursor": step})
    # The run before knows that it has it no more.
    with pytest.raises(TakenOver):
        loop.jobs.advance(job, 0.9, "9 of 10", payload={"cursor": 9})
    with pytest.raises(TakenOver):
        loop.jobs.hold(job)
    assert loop.job(number).payload == {"cursor": 2 * ATTEMPTS - 1}


def test_older_predictions_are_removed_some_time_after_the_newer_ones_came(loop: Loop) -> None:
    first = loop.jobs.plan_tidying(loop.project_id, ["v1"])
    assert loop.jobs.claim(first) is None
    loop.silent_for(first, timedelta(minutes=1))
    assert loop.jobs.due() == []
    # Another version meanwhile: the time begins anew, and nothing is removed twice.
    assert loop.jobs.plan_tidying(loop.project_id, ["v1", "v2"]) == first
    job = loop.job(first)
    assert job.payload == {"versions": ["v1", "v2"]}
    assert job.not_before is not None
    assert timedelta(0) < job.not_before - now() <= STILL_OPEN
