"""One run of a job: the reports of its process are stored, also where the database is locked."""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from ml_backend.jobs.jobs import ATTEMPTS
from ml_backend.jobs.outcomes import Done, Failed, JobEnded, Refused, RetryLater, TakenOver
from ml_backend.jobs.reports import Checkpoint, End, Progress
from ml_backend.reasons import Code, reason
from ml_backend.store import database as module
from ml_backend.store.states import JobKind, JobState
from tests.job_loop import CRASHED, Loop, state_of, tried_again

WHY = reason(Code.TRAINING, epoch=3, loss=0.5)
ENDED = reason(Code.PLAIN, text="so it ended")


def _progress(fraction: float) -> Progress:
    return Progress(fraction=fraction, reason=WHY.as_dict())


def _checkpoint(fraction: float, cursor: int) -> Checkpoint:
    return Checkpoint(
        fraction=fraction, reason=WHY.as_dict(), checkpoint={"cursor": cursor}, version="v1"
    )


def test_apply_progress_and_checkpoint_store_how_far_the_job_is(loop: Loop) -> None:
    job = loop.started()
    run = loop.run_of(job)
    run.apply(_progress(0.4))
    assert (loop.job(job.id).progress, loop.job(job.id).reason) == (0.4, WHY)
    run.apply(_checkpoint(0.5, cursor=7))
    found = loop.job(job.id)
    assert (found.progress, found.checkpoint, found.version) == (0.5, {"cursor": 7}, "v1")


@pytest.mark.parametrize(
    ("outcome", "state"),
    [
        (Refused(ENDED), JobState.REFUSED),
        (Failed(ENDED), JobState.FAILED),
        (RetryLater(ENDED, 60), JobState.QUEUED),
    ],
)
def test_apply_end_without_a_result_moves_the_job_to_its_state(
    loop: Loop, outcome: JobEnded, state: JobState
) -> None:
    job = loop.started()
    loop.run_of(job).apply(End.of(outcome))
    found = loop.job(job.id)
    assert (found.state, found.claim) == (state, None)
    if state == JobState.QUEUED:
        assert found.reason == tried_again(ENDED, 1, ATTEMPTS)
        assert loop.entry(job.id).status == "DELAYED"
    else:
        assert found.reason == ENDED


def test_apply_end_done_of_an_autolabel_asks_for_the_removal_of_stale_predictions(
    loop: Loop,
) -> None:
    loop.promoted("v1")
    job = loop.claim(loop.label().job)
    loop.run_of(job).apply(End.of(Done(ENDED, version="v1", result={"stale": ["v0"]})))
    done, removal = loop.all()
    assert (done.state, done.version, done.progress) == (JobState.DONE, "v1", 1.0)
    assert (removal.kind, removal.state) == (JobKind.REMOVE_STALE, JobState.QUEUED)
    assert loop.entry(removal.id).status == "DELAYED"


def test_apply_end_done_of_a_training_makes_its_version_live(loop: Loop) -> None:
    job = loop.started()
    result = {"card": {}, "promote": True, "parent": None, "revision": loop.project().revision}
    why = reason(Code.FIRST_VERSION, ap50=0.5)
    loop.run_of(job).apply(End.of(Done(why, version="v1", result=result)))
    found = loop.job(job.id)
    assert (found.state, found.version, found.reason) == (JobState.DONE, "v1", why)
    project = loop.project()
    assert (project.live_version, project.trained_revision) == ("v1", project.revision)


def test_apply_end_of_a_training_again_raises_and_keeps_its_version(loop: Loop) -> None:
    key = loop.project().key
    folder = loop.backend.artefacts.publish(key, "v1", lambda _: None, {})
    run = loop.run_of(loop.started())
    result = {"card": {}, "promote": True, "parent": None, "revision": 10}
    end = End.of(Done(reason(Code.FIRST_VERSION, ap50=0.5), version="v1", result=result))
    run.apply(end)
    # The database went away within the commit, which had been stored all the same.
    with pytest.raises(TakenOver):
        run.apply(end)
    assert folder.is_dir()
    assert loop.project().live_version == "v1"


def test_apply_end_of_a_run_that_was_taken_over_raises_and_stores_nothing(loop: Loop) -> None:
    stale = loop.started()
    run = loop.run_of(stale)
    healthy = loop.claim(stale.id, "host-b")
    before, entries = state_of(loop.job(stale.id)), loop.entries()
    result = {"card": {}, "promote": True, "parent": None, "revision": 10}
    for outcome in (
        Done(reason(Code.FIRST_VERSION, ap50=0.5), version="v1", result=result),
        Refused(ENDED),
        Failed(ENDED),
        RetryLater(ENDED, 0),
    ):
        with pytest.raises(TakenOver):
            run.apply(End.of(outcome))
        assert (state_of(loop.job(stale.id)), loop.entries()) == (before, entries), outcome
    with pytest.raises(TakenOver):
        run.apply(_checkpoint(0.5, cursor=7))
    with pytest.raises(TakenOver):
        run.crashed(CRASHED, 0)
    # Putting the job back is not its to do any more; nobody has to know.
    run.stopped()
    assert state_of(loop.job(stale.id)) == before
    assert loop.backend.versions.all(loop.project_id) == []
    assert (loop.project().live_version, loop.project().trained_revision) == (None, 0)
    loop.run_of(healthy).apply(_progress(0.6))


def test_crashed_run_waits_longer_after_each_attempt_and_fails_in_the_end(loop: Loop) -> None:
    job = loop.started()
    for attempt in range(1, ATTEMPTS):
        loop.run_of(job).crashed(CRASHED, 5.0)
        found = loop.job(job.id)
        assert found.reason == tried_again(CRASHED, attempt + 1, ATTEMPTS)
        assert loop.entry(job.id).status == "DELAYED"
        job = loop.claim(job.id)
    loop.run_of(job).crashed(CRASHED, 5.0)
    assert loop.job(job.id).state == JobState.FAILED


def test_stopped_run_is_put_back_at_once_and_not_counted(loop: Loop) -> None:
    job = loop.started()
    loop.run_of(job).stopped()
    found = loop.job(job.id)
    assert (found.state, found.attempt, found.not_before) == (JobState.QUEUED, 0, None)
    assert loop.entry(job.id).status == "ENQUEUED"


# A SQLite file that another connection keeps locked.


class _Warned(logging.Handler):
    """Sets an event when a warning holds some words."""

    def __init__(self, words: str) -> None:
        super().__init__(logging.WARNING)
        self._words = words
        self.heard = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        """Looks at one warning."""
        if self._words in record.getMessage():
            self.heard.set()


@pytest.fixture
def warned() -> Iterator[_Warned]:
    """Hears that a write is put off."""
    handler = _Warned("stored later")
    logger = logging.getLogger("ml_backend.worker.job_run")
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "locked.db"


@pytest.fixture
def locked_loop(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Loop]:
    """A loop on a SQLite file, which waits for a lock for 0.3 s instead of 10."""
    monkeypatch.setattr(module, "_WAIT", 0.3)
    loop = Loop(f"sqlite:///{file}", tmp_path)
    yield loop
    loop.close()


def _lock(file: Path) -> sqlite3.Connection:
    other = sqlite3.connect(file, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    return other


def test_apply_progress_database_locked_drops_the_progress(locked_loop: Loop, file: Path) -> None:
    loop = locked_loop
    job = loop.started()
    run = loop.run_of(job)
    before = state_of(loop.job(job.id))
    with closing(_lock(file)):
        run.apply(_progress(0.4))
        run.beat()
        assert state_of(loop.job(job.id)) == before
    run.apply(_progress(0.5))
    assert loop.job(job.id).progress == 0.5


def test_apply_end_database_locked_stores_the_result_once_it_is_released(
    locked_loop: Loop, file: Path, warned: _Warned
) -> None:
    loop = locked_loop
    job = loop.started()
    run = loop.run_of(job)
    result = {"card": {}, "promote": True, "parent": None, "revision": loop.project().revision}
    end = End.of(Done(reason(Code.FIRST_VERSION, ap50=0.5), version="v1", result=result))
    with ThreadPoolExecutor(1) as pool:
        with closing(_lock(file)):
            run.apply(_progress(0.9))
            stored = pool.submit(run.apply, end)
            assert warned.heard.wait(30)
            assert loop.job(job.id).state == JobState.RUNNING
        stored.result(30)
    done = loop.job(job.id)
    assert (done.state, done.version) == (JobState.DONE, "v1")
    assert loop.project().live_version == "v1"


def test_apply_checkpoint_database_locked_stores_it_once_it_is_released(
    locked_loop: Loop, file: Path, warned: _Warned
) -> None:
    job = locked_loop.started()
    with ThreadPoolExecutor(1) as pool:
        with closing(_lock(file)):
            stored = pool.submit(locked_loop.run_of(job).apply, _checkpoint(0.5, cursor=7))
            assert warned.heard.wait(30)
        stored.result(30)
    assert locked_loop.job(job.id).checkpoint == {"cursor": 7}


def test_stopped_run_database_locked_gives_up_and_leaves_the_job_to_recovery(
    locked_loop: Loop, file: Path
) -> None:
    loop = locked_loop
    job = loop.started()
    with closing(_lock(file)):
        loop.run_of(job).stopped()
    assert loop.job(job.id).state == JobState.RUNNING
    loop.silent(job.id)
    assert loop.jobs.recover() == [f"job-{job.id}-run-1"]
