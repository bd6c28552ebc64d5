"""Asking for predictions and their removal: one job at a time, with one entry in the queue."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest

from ml_backend.jobs.payloads import AutolabelCheckpoint
from ml_backend.jobs.requests import FIRST_TASKS, NEW_TASKS_DELAY, STILL_OPEN
from ml_backend.reasons import Code, reason
from ml_backend.store.states import JobKind, JobState, Trigger
from ml_backend.store.tables import UNTRAINED, now
from ml_backend.wording import words
from tests.job_loop import Entry, Loop

ENDED = reason(Code.PLAIN, text="so it ended")


# Tasks that a request for predictions did not finish.


def test_request_deferred_predictions_queues_a_job_with_the_tasks(loop: Loop) -> None:
    tasks: list[dict[str, Any]] = [
        {"id": 1, "data": {"image": "/data/1.png"}},
        {"id": 2, "data": {}},
    ]
    number = loop.requests.deferred_predictions(loop.project_id, tasks)
    assert loop.entries() == [Entry(f"job-{number}-run-1", "ENQUEUED", "predict")]
    job = loop.claim(number)
    assert (job.kind, job.trigger) == (JobKind.PREDICT, Trigger.PREDICT)
    assert job.payload == {"tasks": tasks}
    assert words(job.reason).startswith("2 tasks left over")
    # Predictions do not stand in a training's way.
    loop.annotate(range(1, 11))
    assert loop.ask().state == JobState.QUEUED


# Auto-labelling.


def test_request_autolabel_before_any_version_waits_a_little_for_more_tasks(loop: Loop) -> None:
    first = loop.label()
    assert first.state == JobState.QUEUED
    assert words(first.reason) == "the first tasks are chosen, for how they differ"
    job = loop.job(first.job)
    assert job.trigger == Trigger.TASKS
    assert job.checkpoint["version"] == UNTRAINED
    assert job.not_before is not None
    assert timedelta(0) < job.not_before - now() <= NEW_TASKS_DELAY
    assert loop.entries() == [Entry(f"job-{first.job}-run-1", "DELAYED", "autolabel")]


def test_request_autolabel_version_goes_live_hastens_the_job_that_waits(loop: Loop) -> None:
    first = loop.label()
    loop.promoted("v1")
    asked = loop.label()
    assert (asked.job, asked.state) == (first.job, JobState.QUEUED)
    assert words(asked.reason) == "v1 is live"
    job = loop.job(asked.job)
    assert (job.run, job.not_before, job.trigger) == (2, None, Trigger.PROMOTION)
    assert loop.entry(job.id) == Entry(f"job-{job.id}-run-2", "ENQUEUED", "autolabel")
    # The delayed entry of the first run does nothing any more.
    assert loop.jobs.claim(job.id, 1, "host-a") is None
    assert loop.jobs.claim(job.id, 2, "host-a") is not None


def test_request_autolabel_again_for_the_same_version_changes_nothing(loop: Loop) -> None:
    loop.promoted("v1")
    asked = loop.label()
    assert words(asked.reason) == "v1 is live"
    assert loop.job(asked.job).version == "v1"
    for forced in (False, True):
        assert loop.label(forced=forced).job == asked.job
    assert loop.entries() == [Entry(f"job-{asked.job}-run-1", "ENQUEUED", "autolabel")]


def test_request_autolabel_version_goes_live_while_one_runs_follows_after_its_end(
    loop: Loop,
) -> None:
    loop.promoted("v1")
    running = loop.claim(loop.label().job)
    loop.promoted("v2")
    assert loop.label().job == running.id
    assert len(loop.entries()) == 1
    superseded = reason(Code.SUPERSEDED, version="v2", done=1, total=2)
    loop.jobs.finish(running, JobState.DONE, superseded, version="v1")
    following = loop.label()
    assert following.job != running.id
    assert words(following.reason) == "v2 is live"
    assert loop.entry(following.job).status == "ENQUEUED"


@pytest.mark.parametrize("end", [JobState.DONE, JobState.FAILED, JobState.REFUSED])
def test_request_autolabel_after_one_of_the_live_version_is_not_needed_unless_forced(
    loop: Loop, end: JobState
) -> None:
    loop.promoted("v1")
    job = loop.claim(loop.label().job)
    loop.jobs.finish(job, end, ENDED, version="v1")
    assert loop.requests.autolabel(loop.project_id) is None
    asked = loop.label(forced=True)
    assert asked.job != job.id
    assert words(asked.reason) == "asked for, with v1"
    assert loop.job(asked.job).trigger == Trigger.COMMAND
    assert loop.entry(asked.job).status == "ENQUEUED"


def test_request_autolabel_first_tasks_are_chosen_until_there_are_enough(loop: Loop) -> None:
    number = loop.label().job
    for imported in (40, FIRST_TASKS):
        job = loop.claim(number)
        checkpoint = AutolabelCheckpoint.model_validate(job.checkpoint)
        checkpoint.imported = imported
        loop.jobs.advance(job, 1.0, ENDED, checkpoint.stored(), version=UNTRAINED)
        loop.jobs.finish(job, JobState.DONE, ENDED, version=UNTRAINED)
        assert loop.requests.autolabel(loop.project_id) is None
        # More tasks: as long as there are too few, they may be chosen as well.
        loop.add_task(imported)
        following = loop.requests.autolabel(loop.project_id)
        assert (following is None) == (imported == FIRST_TASKS)
        if following is not None:
            number = following.job
            assert loop.job(number).checkpoint["imported"] == imported


def test_request_autolabel_tasks_arrive_waits_a_little_unless_forced(loop: Loop) -> None:
    loop.promoted("v1")
    first = loop.claim(loop.label().job)
    loop.jobs.finish(first, JobState.DONE, ENDED, version="v1")
    # A task that was heard of with its annotation is none to predict.
    loop.annotate(range(1, 3))
    assert loop.requests.autolabel(loop.project_id) is None
    loop.add_task(3)
    arrived = loop.label()
    job = loop.job(arrived.job)
    assert (job.trigger, words(job.reason)) == (Trigger.TASKS, "new tasks have arrived")
    # They come in several events.
    assert loop.entry(job.id).status == "DELAYED"
    assert loop.label().job == job.id
    assert loop.job(job.id).run == 1
    asked = loop.label(forced=True)
    assert asked.job == job.id
    assert loop.entry(job.id) == Entry(f"job-{job.id}-run-2", "ENQUEUED", "autolabel")
    assert loop.jobs.claim(job.id, 1, "host-a") is None
    loop.jobs.finish(loop.claim(job.id), JobState.DONE, ENDED, version="v1")
    assert loop.requests.autolabel(loop.project_id) is None


def test_request_autolabel_from_eight_threads_at_once_makes_one_job(loop: Loop) -> None:
    loop.promoted("v1")
    with ThreadPoolExecutor(8) as pool:
        asked = [f.result() for f in [pool.submit(loop.label) for _ in range(24)]]
    (number,) = {a.job for a in asked}
    assert loop.entries() == [Entry(f"job-{number}-run-1", "ENQUEUED", "autolabel")]


def test_request_autolabel_while_its_shards_run_changes_nothing(loop: Loop) -> None:
    loop.promoted("v1")
    parent, _ = loop.sharded((0, 50), (50, 90))
    entries = loop.entries()
    loop.promoted("v2")
    for forced in (False, True):
        asked = loop.label(forced=forced)
        assert (asked.job, asked.state) == (parent.id, JobState.WAITING)
    assert loop.entries() == entries


# Predictions of older versions.


def test_request_stale_removal_waits_until_nobody_works_with_them(loop: Loop) -> None:
    with loop.database.session() as session:
        number = loop.requests.stale_removal(session, loop.project_id, ["v1"])
    job = loop.job(number)
    assert (job.kind, job.state) == (JobKind.REMOVE_STALE, JobState.QUEUED)
    assert job.not_before is not None
    assert timedelta(0) < job.not_before - now() <= STILL_OPEN
    assert words(job.reason).startswith("predictions of older versions are removed at ")
    assert loop.entries() == [Entry(f"job-{number}-run-1", "DELAYED", "remove_stale")]


def test_request_stale_removal_again_begins_the_time_anew(loop: Loop) -> None:
    with loop.database.session() as session:
        first = loop.requests.stale_removal(session, loop.project_id, ["v1"])
    before = loop.job(first).not_before
    with loop.database.session() as session:
        assert loop.requests.stale_removal(session, loop.project_id, ["v1", "v2"]) == first
    after = loop.job(first).not_before
    assert before is not None
    assert after is not None
    assert after > before
    assert loop.entry(first) == Entry(f"job-{first}-run-2", "DELAYED", "remove_stale")
    # Nothing is removed twice: the older entry does nothing any more.
    assert loop.jobs.claim(first, 1, "host-a") is None
    assert loop.claim(first).payload == {"versions": ["v1", "v2"]}


def test_request_stale_removal_while_one_runs_makes_another_job(loop: Loop) -> None:
    with loop.database.session() as session:
        first = loop.requests.stale_removal(session, loop.project_id, ["v1"])
    running = loop.claim(first)
    with loop.database.session() as session:
        second = loop.requests.stale_removal(session, loop.project_id, ["v2"])
    assert second != first
    assert loop.jobs.holds(first, str(running.claim))


def test_request_in_a_transaction_that_rolls_back_leaves_neither_row_nor_entry(
    loop: Loop,
) -> None:
    with pytest.raises(RuntimeError), loop.database.session() as session:
        loop.requests.stale_removal(session, loop.project_id, ["v1"])
        raise RuntimeError
    assert (loop.all(), loop.entries()) == ([], [])
    with loop.database.session() as session:
        number = loop.requests.stale_removal(session, loop.project_id, ["v1"])
    before = loop.entries()
    with pytest.raises(RuntimeError), loop.database.session() as session:
        loop.requests.stale_removal(session, loop.project_id, ["v2"])
        raise RuntimeError
    assert loop.entries() == before
    assert loop.job(number).run == 1
