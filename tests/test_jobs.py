"""Jobs: only the run that holds the claim writes, and no job is lost with its worker."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import event, inspect

from ml_backend.jobs.jobs import ATTEMPTS
from ml_backend.jobs.outcomes import TakenOver
from ml_backend.reasons import Code, reason
from ml_backend.store.states import JobState
from ml_backend.store.tables import Job, now
from ml_backend.wording import words
from tests.job_loop import CRASHED, Loop, state_of, tried_again

ENDS = [JobState.DONE, JobState.REFUSED, JobState.FAILED]
LOST = reason(Code.WORKER_LOST)
ENDED = reason(Code.PLAIN, text="so it ended")


# Claims.


def test_claim_queued_job_runs_it_under_a_new_claim(loop: Loop) -> None:
    loop.annotate(range(1, 11))
    number = loop.ask().job
    claimed = loop.jobs.claim(number, 1, "host-a")
    assert claimed is not None
    assert (claimed.state, claimed.attempt, claimed.host) == (JobState.RUNNING, 1, "host-a")
    assert claimed.claim
    assert claimed.started_at is not None
    assert state_of(loop.job(number)) == state_of(claimed)
    assert loop.jobs.holds(number, claimed.claim)


def test_claim_from_several_threads_at_once_leaves_one_claim_that_holds(loop: Loop) -> None:
    loop.annotate(range(1, 11))
    number = loop.ask().job
    with ThreadPoolExecutor(ATTEMPTS) as pool:
        claimed = list(pool.map(lambda _: loop.claim(number), range(ATTEMPTS)))
    assert len({job.claim for job in claimed}) == ATTEMPTS
    assert [loop.jobs.holds(number, str(job.claim)) for job in claimed].count(True) == 1
    assert loop.job(number).attempt == ATTEMPTS


def test_claim_waiting_job_answers_none(loop: Loop) -> None:
    loop.annotate(range(1, 3))
    waiting = loop.ask()
    assert waiting.state == JobState.WAITING
    for run in (0, 1):
        assert loop.jobs.claim(waiting.job, run, "host-a") is None
    assert loop.job(waiting.job).state == JobState.WAITING


@pytest.mark.parametrize("end", ENDS)
def test_claim_ended_job_answers_none(loop: Loop, end: JobState) -> None:
    job = loop.started()
    loop.jobs.finish(job, end, ENDED)
    before = state_of(loop.job(job.id))
    assert loop.jobs.claim(job.id, job.run, "host-a") is None
    assert state_of(loop.job(job.id)) == before


def test_claim_unknown_job_answers_none(loop: Loop) -> None:
    assert loop.jobs.claim(12345, 1, "host-a") is None


def test_claim_for_an_older_run_answers_none(loop: Loop) -> None:
    job = loop.started()
    old = job.run
    loop.jobs.put_back(job, CRASHED, wait=3600)
    assert loop.jobs.claim(job.id, old, "host-a") is None
    assert loop.job(job.id).state == JobState.QUEUED
    assert loop.claim(job.id).run == old + 1


def test_claim_running_job_under_the_same_run_takes_it_over(loop: Loop) -> None:
    first = loop.started()
    second = loop.jobs.claim(first.id, first.run, "host-b")
    assert second is not None
    assert (second.attempt, second.host, second.run) == (2, "host-b", first.run)
    assert second.claim != first.claim
    assert not loop.jobs.holds(first.id, str(first.claim))
    with pytest.raises(TakenOver):
        loop.jobs.beat(first)
    loop.jobs.beat(second)


def test_claim_running_job_after_the_last_attempt_fails_it(loop: Loop) -> None:
    job = loop.started()
    for _ in range(1, ATTEMPTS):
        job = loop.claim(job.id)
    assert loop.jobs.claim(job.id, job.run, "host-b") is None
    failed = loop.job(job.id)
    assert (failed.state, failed.claim) == (JobState.FAILED, None)
    assert failed.reason == reason(Code.GAVE_UP, attempts=ATTEMPTS, why=LOST)
    assert failed.finished_at is not None
    with pytest.raises(TakenOver):
        loop.jobs.finish(job, JobState.DONE, ENDED)


def test_claimed_answers_the_job_only_under_the_claim_that_holds(loop: Loop) -> None:
    first = loop.started()
    second = loop.claim(first.id)
    assert loop.jobs.claimed(first.id, str(first.claim)) is None
    found = loop.jobs.claimed(first.id, str(second.claim))
    assert found is not None
    assert found.payload == {}
    loop.jobs.finish(second, JobState.DONE, ENDED)
    assert loop.jobs.claimed(first.id, str(second.claim)) is None


# Progress, and the end of a job.


def test_progress_claimed_job_stores_fraction_and_reason(loop: Loop) -> None:
    job = loop.started()
    why = reason(Code.TRAINING, epoch=3, loss=0.5)
    loop.jobs.progress(job, 0.4, why)
    found = loop.job(job.id)
    assert (found.state, found.progress, found.reason) == (JobState.RUNNING, 0.4, why)


def test_finish_done_stores_version_and_whole_progress(loop: Loop) -> None:
    job = loop.started()
    loop.jobs.finish(job, JobState.DONE, ENDED, version="v1")
    done = loop.job(job.id)
    assert (done.state, done.version, done.progress) == (JobState.DONE, "v1", 1.0)
    assert (done.claim, done.reason) == (None, ENDED)
    assert done.finished_at is not None


def test_finish_in_a_transaction_that_rolls_back_leaves_the_job_running(loop: Loop) -> None:
    job = loop.started()
    before = state_of(loop.job(job.id))
    with pytest.raises(RuntimeError), loop.database.session() as session:
        loop.jobs.finish(job, JobState.DONE, ENDED, session=session)
        raise RuntimeError
    assert state_of(loop.job(job.id)) == before
    loop.jobs.finish(job, JobState.DONE, ENDED)


def _finish(state: JobState) -> Callable[[Loop, Job], None]:
    return lambda loop, job: loop.jobs.finish(job, state, ENDED, version="v1")


def _finish_in_session(loop: Loop, job: Job) -> None:
    with loop.database.session() as session:
        loop.jobs.finish(job, JobState.FAILED, ENDED, session=session)


def _wait_for_shards(loop: Loop, job: Job) -> None:
    with loop.database.session() as session:
        loop.jobs.wait_for_shards(session, job, ENDED, {"sharded": True})


WRITES: dict[str, Callable[[Loop, Job], object]] = {
    "beat": lambda loop, job: loop.jobs.beat(job),
    "progress": lambda loop, job: loop.jobs.progress(job, 0.9, ENDED),
    "advance": lambda loop, job: loop.jobs.advance(job, 0.9, ENDED, {"cursor": 9}, "v1"),
    "put back": lambda loop, job: loop.jobs.put_back(job, CRASHED, wait=0),
    "put back, not counted": lambda loop, job: loop.jobs.put_back(
        job, CRASHED, wait=0, counts=False
    ),
    "finish as done": _finish(JobState.DONE),
    "finish as refused": _finish(JobState.REFUSED),
    "finish as failed": _finish(JobState.FAILED),
    "finish in a transaction": _finish_in_session,
    "wait for shards": _wait_for_shards,
}


def test_write_of_a_run_that_was_taken_over_raises_and_changes_nothing(loop: Loop) -> None:
    stale = loop.started()
    loop.silent(stale.id)
    loop.jobs.recover()
    healthy = loop.claim(stale.id, "host-b")
    before, entries = state_of(loop.job(stale.id)), loop.entries()
    for name, write in WRITES.items():
        with pytest.raises(TakenOver):
            write(loop, stale)
        assert (state_of(loop.job(stale.id)), loop.entries()) == (before, entries), name
    loop.jobs.finish(healthy, JobState.DONE, ENDED, version="v2")
    assert loop.job(stale.id).version == "v2"


@pytest.mark.parametrize("end", ENDS)
def test_write_to_a_job_that_has_ended_raises_and_changes_nothing(
    loop: Loop, end: JobState
) -> None:
    job = loop.started()
    loop.jobs.finish(job, end, ENDED)
    before, entries = state_of(loop.job(job.id)), loop.entries()
    # Its process crashed on its way out, for example.
    for name, write in WRITES.items():
        with pytest.raises(TakenOver):
            write(loop, job)
        assert (state_of(loop.job(job.id)), loop.entries()) == (before, entries), name


def test_write_of_a_run_that_was_put_back_raises_until_it_is_claimed_again(loop: Loop) -> None:
    job = loop.started()
    loop.jobs.put_back(job, CRASHED, wait=0)
    with pytest.raises(TakenOver):
        loop.jobs.finish(job, JobState.FAILED, ENDED)
    assert loop.job(job.id).state == JobState.QUEUED


# Checkpoints and payloads.


def test_advance_resets_the_attempts_and_keeps_the_checkpoint_for_the_next_run(loop: Loop) -> None:
    job = loop.started()
    for step in range(1, 2 * ATTEMPTS):
        before = job
        loop.jobs.advance(job, step / 10, ENDED, {"cursor": step})
        assert loop.jobs.put_back(job, CRASHED, wait=0) == JobState.QUEUED
        job = loop.claim(job.id)
        assert (job.attempt, job.checkpoint) == (2, {"cursor": step})
    with pytest.raises(TakenOver):
        loop.jobs.advance(before, 0.9, ENDED, {"cursor": 9})
    assert loop.job(job.id).checkpoint == {"cursor": 2 * ATTEMPTS - 1}


def test_advance_without_a_version_keeps_the_one_that_is_stored(loop: Loop) -> None:
    job = loop.started()
    loop.jobs.advance(job, 0.1, ENDED, {}, "v1")
    loop.jobs.advance(job, 0.2, ENDED, {"cursor": 2})
    assert loop.job(job.id).version == "v1"


def test_get_job_leaves_its_payload_unread_and_claim_reads_it(loop: Loop) -> None:
    tasks = [{"id": n, "data": {"image": f"/data/{n}.png"}} for n in range(1, 4)]
    number = loop.requests.deferred_predictions(loop.project_id, tasks)
    assert "payload" in inspect(loop.job(number)).unloaded
    claimed = loop.claim(number)
    assert claimed.payload == {"tasks": tasks}


@pytest.mark.parametrize("name", ["progress", "advance", "put back", "finish as done"])
def test_write_of_a_claimed_job_does_not_write_its_payload_again(loop: Loop, name: str) -> None:
    marker = "a-task-that-was-left-over"
    number = loop.requests.deferred_predictions(loop.project_id, [{"id": 1, "data": {"x": marker}}])
    job = loop.claim(number)
    written: list[str] = []

    def record(connection: Any, cursor: Any, statement: str, parameters: Any, *_: object) -> None:
        if statement.startswith("UPDATE jobs"):
            written.append(f"{statement} {parameters}")

    event.listen(loop.database.engine, "before_cursor_execute", record)
    WRITES[name](loop, job)
    event.remove(loop.database.engine, "before_cursor_execute", record)
    assert written
    assert not any("payload" in said or marker in said for said in written), written


# Jobs that are put back.


def test_put_back_with_a_wait_puts_a_delayed_entry_into_the_queue(loop: Loop) -> None:
    job = loop.started()
    moment = now()
    assert loop.jobs.put_back(job, CRASHED, wait=3600) == JobState.QUEUED
    found = loop.job(job.id)
    assert (found.state, found.claim, found.run) == (JobState.QUEUED, None, 2)
    assert found.reason == tried_again(CRASHED, 2, ATTEMPTS)
    assert words(found.reason).endswith(f"; tried again (attempt 2 of {ATTEMPTS})")
    assert found.not_before is not None
    assert 3600 <= (found.not_before - moment).total_seconds() < 3660
    assert loop.entry(job.id).status == "DELAYED"
    claimed = loop.claim(job.id)
    assert (claimed.attempt, claimed.not_before) == (2, None)


def test_put_back_without_a_wait_puts_an_entry_into_the_queue_at_once(loop: Loop) -> None:
    job = loop.started()
    loop.jobs.put_back(job, CRASHED, wait=0)
    assert [entry.id for entry in loop.entries()] == [f"job-{job.id}-run-{n}" for n in (1, 2)]
    assert loop.entry(job.id).status == "ENQUEUED"
    assert loop.job(job.id).not_before is None


def test_put_back_after_the_last_attempt_fails_the_job(loop: Loop) -> None:
    job = loop.started()
    for _ in range(1, ATTEMPTS):
        assert loop.jobs.put_back(job, CRASHED, wait=0) == JobState.QUEUED
        job = loop.claim(job.id)
    entries = loop.entries()
    assert loop.jobs.put_back(job, CRASHED, wait=0) == JobState.FAILED
    failed = loop.job(job.id)
    assert failed.reason == reason(Code.GAVE_UP, attempts=ATTEMPTS, why=CRASHED)
    assert words(failed.reason).startswith(f"failed after {ATTEMPTS} attempts: the training")
    assert failed.finished_at is not None
    assert loop.entries() == entries


def test_put_back_not_counted_goes_on_for_ever(loop: Loop) -> None:
    stopped = reason(Code.WORKER_STOPPED)
    job = loop.started()
    for _ in range(2 * ATTEMPTS):
        assert loop.jobs.put_back(job, stopped, wait=0, counts=False) == JobState.QUEUED
        assert loop.job(job.id).reason == tried_again(stopped, 1, ATTEMPTS)
        job = loop.claim(job.id)
        assert job.attempt == 1
    assert loop.job(job.id).state == JobState.RUNNING


# Jobs whose worker is lost.


def test_recover_silent_job_puts_it_back_and_answers_its_entry(loop: Loop) -> None:
    job = loop.started()
    loop.silent(job.id)
    assert loop.jobs.recover() == [f"job-{job.id}-run-1"]
    found = loop.job(job.id)
    assert (found.state, found.claim, found.run) == (JobState.QUEUED, None, 2)
    assert found.reason == tried_again(LOST, 2, ATTEMPTS)
    assert loop.entry(job.id).status == "ENQUEUED"
    assert loop.jobs.recover() == []
    claimed = loop.claim(job.id)
    assert (claimed.attempt, claimed.progress) == (2, 0.0)


@pytest.mark.parametrize("status", [None, "PENDING", "ERROR", "SUCCESS", "CANCELLED"])
def test_requeue_lost_job_whose_entry_starts_nothing_puts_it_into_the_queue_again(
    loop: Loop, status: str | None
) -> None:
    loop.annotate(range(1, 11))
    number = loop.ask().job
    loop.queued_long_ago(number, status)
    loop.jobs.requeue_lost()
    assert (loop.job(number).state, loop.job(number).run) == (JobState.QUEUED, 2)
    assert loop.entry(number).status == "ENQUEUED"
    loop.jobs.requeue_lost()
    assert loop.job(number).run == 2
    assert loop.jobs.claim(number, 1, "host-a") is None
    assert loop.claim(number).state == JobState.RUNNING


def test_requeue_lost_job_that_waits_in_the_queue_leaves_it_alone(loop: Loop) -> None:
    loop.annotate(range(1, 11))
    number = loop.ask().job
    loop.queued_long_ago(number, "ENQUEUED")
    loop.jobs.requeue_lost()
    assert loop.job(number).run == 1


def test_recover_job_with_a_fresh_heartbeat_leaves_it_alone(loop: Loop) -> None:
    job = loop.started()
    assert loop.jobs.recover() == []
    loop.silent(job.id)
    loop.jobs.beat(job)
    assert loop.jobs.recover() == []
    loop.silent(job.id)
    loop.jobs.progress(job, 0.2, ENDED)
    assert loop.jobs.recover() == []
    loop.silent(job.id)
    loop.jobs.advance(job, 0.3, ENDED, {"cursor": 3})
    assert loop.jobs.recover() == []
    assert loop.job(job.id).state == JobState.RUNNING


def test_recover_leaves_out_the_jobs_of_this_process(loop: Loop) -> None:
    own = loop.started()
    other = loop.claim(loop.requests.deferred_predictions(loop.project_id, [{"id": 1}]))
    for job in (own, other):
        loop.silent(job.id)
    assert loop.jobs.recover({own.id}) == [f"job-{other.id}-run-1"]
    assert loop.job(own.id).state == JobState.RUNNING
    assert loop.job(other.id).state == JobState.QUEUED
    # Its heartbeat was late because the database was locked.
    loop.jobs.beat(own)


def test_recover_job_after_the_last_attempt_fails_it(loop: Loop) -> None:
    job = loop.started()
    for attempt in range(1, ATTEMPTS + 1):
        assert loop.job(job.id).attempt == attempt
        loop.silent(job.id)
        assert loop.jobs.recover() == [f"job-{job.id}-run-{attempt}"]
        if attempt < ATTEMPTS:
            job = loop.claim(job.id)
    failed = loop.job(job.id)
    assert failed.state == JobState.FAILED
    assert failed.reason == reason(Code.GAVE_UP, attempts=ATTEMPTS, why=LOST)
    assert words(failed.reason) == f"failed after {ATTEMPTS} attempts: its worker was stopped"
    assert failed.finished_at is not None
    assert loop.jobs.claim(job.id, job.run, "host-a") is None
    assert loop.jobs.recover() == []
