"""Asking for trainings: one at a time, with one entry in the queue and a reason to read."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, timedelta

import pytest
from sqlalchemy import update

from ml_backend.jobs.schedule import FEWEST, PATIENCE
from ml_backend.label_studio.events import ProjectInfo
from ml_backend.reasons import Code, reason
from ml_backend.store.states import JobState, Trigger
from ml_backend.store.tables import Project, now
from ml_backend.wording import words
from tests.job_loop import CRASHED, PROJECT, Entry, Loop, MakeLoop

UNREADABLE = reason(Code.TOO_FEW_IMAGES, images=0)
ENDED = reason(Code.PLAIN, text="so it ended")


@pytest.fixture
def patient_loop(make_loop: MakeLoop) -> Loop:
    """A loop with a quiet time of ten minutes."""
    return make_loop(ML_BACKEND_TRAIN_DELAY="600")


def test_request_training_too_few_annotations_waits_and_keeps_one_job(loop: Loop) -> None:
    loop.annotate(range(1, 3))
    first = loop.ask()
    assert first.state == JobState.WAITING
    assert first.reason == reason(Code.FIRST_TRAINING_WAITS, annotated=2, minimum=10)
    assert "waiting for 8 more annotated tasks" in words(first.reason)
    loop.annotate(range(3, 10))
    second = loop.ask()
    assert second.job == first.job
    assert "waiting for 1 more annotated task " in words(second.reason)
    assert loop.job(first.job).reason == second.reason
    assert loop.entries() == []


def test_request_training_enough_annotations_queues_the_waiting_job_once(loop: Loop) -> None:
    loop.annotate(range(1, 10))
    waiting = loop.ask()
    loop.annotate(range(10, 11))
    due = loop.ask()
    assert (due.job, due.state) == (waiting.job, JobState.QUEUED)
    assert words(due.reason) == "10 new or changed annotations, 10 annotated tasks"
    assert loop.entries() == [Entry(f"job-{due.job}-run-1", "ENQUEUED", "train")]
    again = loop.ask()
    assert (again.job, again.state, again.reason) == (due.job, JobState.QUEUED, due.reason)
    assert loop.entries() == [Entry(f"job-{due.job}-run-1", "ENQUEUED", "train")]


def test_request_training_within_the_quiet_time_waits_until_its_end(patient_loop: Loop) -> None:
    loop = patient_loop
    loop.annotate(range(1, 11))
    asked = loop.ask()
    assert asked.state == JobState.WAITING
    waiting = loop.requests.waiting_training(loop.project_id)
    assert waiting is not None
    assert waiting.id == asked.job
    until = waiting.not_before
    changed = loop.project().changed_at
    assert until is not None
    assert changed is not None
    assert until == changed + timedelta(seconds=600)
    at = until.astimezone(UTC)
    assert words(asked.reason).startswith(f"quiet time: starts at {at:%H:%M:%S} UTC")
    # One more annotation begins the quiet time anew.
    loop.annotate(range(11, 12))
    assert loop.ask().job == asked.job
    later = loop.job(asked.job).not_before
    assert later is not None
    assert later > until
    assert loop.entries() == []
    with loop.database.session() as session:
        session.execute(update(Project).values(changed_at=now() - timedelta(seconds=601)))
    due = loop.ask()
    assert (due.job, due.state) == (asked.job, JobState.QUEUED)
    assert loop.entry(due.job).status == "ENQUEUED"
    assert loop.requests.waiting_training(loop.project_id) is None


def test_request_training_annotators_never_pause_starts_after_five_quiet_times(
    patient_loop: Loop,
) -> None:
    patient_loop.annotate(range(1, 11))
    number = patient_loop.ask().job
    for passed in (PATIENCE * 300, PATIENCE * 300 + 1):
        assert patient_loop.job(number).state == JobState.WAITING
        patient_loop.annotate(range(11, 12))
        patient_loop.enough_for(number, passed)
        patient_loop.ask()
    assert patient_loop.job(number).state == JobState.QUEUED


def test_request_training_by_the_button_does_not_wait_for_the_quiet_time(
    patient_loop: Loop,
) -> None:
    patient_loop.annotate(range(1, 4))
    waiting = patient_loop.ask()
    pressed = patient_loop.ask(forced=True)
    assert (pressed.job, pressed.state) == (waiting.job, JobState.QUEUED)
    assert words(pressed.reason) == "asked for, with 3 annotated tasks"
    assert patient_loop.job(pressed.job).trigger == Trigger.BUTTON
    assert patient_loop.entry(pressed.job).status == "ENQUEUED"
    assert patient_loop.claim(pressed.job).state == JobState.RUNNING


def test_request_training_while_one_runs_tells_how_far_it_is(loop: Loop) -> None:
    running = loop.started()
    why = reason(Code.TRAINING, epoch=3, loss=0.5)
    loop.jobs.progress(running, 0.4, why)
    entries = loop.entries()
    for forced in (False, True):
        asked = loop.ask(forced=forced)
        assert (asked.job, asked.state) == (running.id, JobState.RUNNING)
        assert words(asked.reason).startswith("a training is running already, at 40%")
    assert loop.job(running.id).reason == why
    assert loop.entries() == entries


def test_request_training_by_the_button_starts_one_that_was_put_off(loop: Loop) -> None:
    running = loop.started()
    old = running.run
    loop.jobs.put_back(running, CRASHED, wait=3600)
    assert loop.entry(running.id).status == "DELAYED"
    # By itself, nothing begins sooner.
    assert loop.ask().job == running.id
    assert loop.entry(running.id).status == "DELAYED"
    pressed = loop.ask(forced=True)
    assert (pressed.job, pressed.state) == (running.id, JobState.QUEUED)
    assert loop.job(running.id).not_before is None
    assert loop.entry(running.id) == Entry(f"job-{running.id}-run-3", "ENQUEUED", "train")
    for run in (old, old + 1):
        assert loop.jobs.claim(running.id, run, "host-a") is None
    assert loop.jobs.claim(running.id, old + 2, "host-a") is not None


def test_request_training_by_the_button_too_few_annotations_and_no_token_is_refused(
    loop: Loop,
) -> None:
    loop.annotate(range(1, 2))
    asked = loop.ask(forced=True)
    assert asked.state == JobState.REFUSED
    assert asked.reason == reason(Code.TOO_FEW_ANNOTATED, annotated=1, needed=FEWEST)
    assert "at least 2 annotated tasks and there is 1" in words(asked.reason)
    assert loop.job(asked.job).finished_at is not None
    assert loop.entries() == []
    # The refusal ends that job, and the next request is a new one.
    loop.annotate(range(2, 3))
    again = loop.ask(forced=True)
    assert again.job != asked.job
    assert again.state == JobState.QUEUED


def test_request_training_by_the_button_too_few_annotations_and_a_token_is_queued(
    make_loop: MakeLoop,
) -> None:
    loop = make_loop(LABEL_STUDIO_URL="http://127.0.0.1:1", LABEL_STUDIO_API_KEY="token")
    asked = loop.ask(forced=True)
    assert (asked.state, asked.reason) == (JobState.QUEUED, reason(Code.ASKED_FOR, annotated=0))
    assert loop.entry(asked.job).status == "ENQUEUED"


def test_request_training_not_forced_too_few_annotations_and_a_token_waits(
    make_loop: MakeLoop,
) -> None:
    loop = make_loop(LABEL_STUDIO_URL="http://127.0.0.1:1", LABEL_STUDIO_API_KEY="token")
    assert loop.ask().state == JobState.WAITING
    assert loop.entries() == []


def test_request_training_by_the_button_project_of_another_label_studio_is_refused(
    make_loop: MakeLoop,
) -> None:
    loop = make_loop(LABEL_STUDIO_URL="http://127.0.0.1:1", LABEL_STUDIO_API_KEY="token")
    with loop.database.session() as session:
        session.execute(update(Project).values(is_default=False))
    assert loop.ask(forced=True).state == JobState.REFUSED


def test_request_training_by_the_button_too_few_annotations_token_of_setup_is_queued(
    loop: Loop,
) -> None:
    loop.backend.ingest.introduce(
        PROJECT.key, PROJECT.id, label_config="<View/>", url="http://127.0.0.1:1", token="token"
    )
    asked = loop.ask(forced=True)
    assert asked.state == JobState.QUEUED
    assert loop.entry(asked.job).status == "ENQUEUED"


@pytest.mark.parametrize("forced", [False, True])
def test_request_training_from_eight_threads_at_once_makes_one_job(
    loop: Loop, forced: bool
) -> None:
    loop.annotate(range(1, 11))
    with ThreadPoolExecutor(8) as pool:
        asked = [f.result() for f in [pool.submit(loop.ask, forced=forced) for _ in range(24)]]
    (number,) = {a.job for a in asked}
    assert [job.state for job in loop.all()] == [JobState.QUEUED]
    assert loop.entries() == [Entry(f"job-{number}-run-1", "ENQUEUED", "train")]


def test_request_training_of_two_projects_makes_a_job_for_each(loop: Loop) -> None:
    first = loop.started()
    other = ProjectInfo("8.1795463889", 8, "others", "<View/>", None, None)
    number = loop.introduce(other)
    loop.annotate(range(1, 3), other)
    asked = loop.requests.training(number, forced=True)
    assert asked.job != first.id
    assert asked.state == JobState.QUEUED
    assert loop.entry(asked.job).status == "ENQUEUED"


def test_request_training_changes_during_a_training_lead_to_the_next(loop: Loop) -> None:
    running = loop.started()
    seen = loop.project().revision
    loop.annotate(range(11, 16))
    loop.trained("v1", seen)
    loop.jobs.finish(running, JobState.DONE, ENDED, version="v1")
    following = loop.ask()
    assert following.job != running.id
    assert following.state == JobState.QUEUED
    assert words(following.reason) == "5 new or changed annotations, 15 annotated tasks"
    assert loop.entry(following.job).status == "ENQUEUED"


def test_request_training_after_one_that_saw_all_waits_for_changes(loop: Loop) -> None:
    running = loop.started()
    loop.trained("v1", loop.project().revision)
    loop.jobs.finish(running, JobState.DONE, ENDED, version="v1")
    loop.annotate(range(1, 3))
    asked = loop.ask()
    assert asked.state == JobState.WAITING
    assert asked.reason == reason(Code.CHANGES_AWAITED, changes=2, needed=5)
    assert "waiting for 3 more new or changed annotations (2 of 5)" in words(asked.reason)


@pytest.mark.parametrize("end", [JobState.REFUSED, JobState.FAILED])
def test_request_training_after_a_fruitless_one_waits_until_an_annotation_changes(
    loop: Loop, end: JobState
) -> None:
    running = loop.started()
    loop.jobs.finish(running, end, UNREADABLE)
    entries = loop.entries()
    asked = loop.ask()
    assert (asked.job, asked.state, asked.reason) == (running.id, end, UNREADABLE)
    assert len(loop.all()) == 1
    assert loop.entries() == entries
    loop.annotate(range(1, 2))
    following = loop.ask()
    assert following.job != running.id
    assert following.state == JobState.QUEUED


@pytest.mark.parametrize("end", [JobState.REFUSED, JobState.FAILED])
def test_request_training_by_the_button_after_a_fruitless_one_starts_another(
    loop: Loop, end: JobState
) -> None:
    running = loop.started()
    loop.jobs.finish(running, end, UNREADABLE)
    asked = loop.ask(forced=True)
    assert asked.job != running.id
    assert asked.state == JobState.QUEUED
    assert loop.entry(asked.job).status == "ENQUEUED"
