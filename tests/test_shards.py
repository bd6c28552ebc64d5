"""Shards of an auto-labelling: their parent waits for them, and goes on after the last."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from ml_backend.http.app import create_app
from ml_backend.jobs.jobs import ATTEMPTS
from ml_backend.jobs.payloads import AutolabelCheckpoint
from ml_backend.reasons import Code, reason
from ml_backend.store.states import JobState
from ml_backend.training.promotion import Verdict
from tests.conftest import record_version
from tests.job_loop import CRASHED, Loop, state_of

PREDICTIONS = re.compile(
    r'ml_backend_job_(\w+)_total\{kind="(\w+)",project="7\.1795463889"\} (\S+)'
)
"""A counter of `/metrics`: its name, the kind of the jobs, and the number."""
ENDS = [JobState.DONE, JobState.REFUSED, JobState.FAILED]
ENDED = reason(Code.PLAIN, text="so it ended")


def test_finish_of_shards_moves_their_parent_on_and_queues_it_after_the_last(loop: Loop) -> None:
    loop.promoted("v1")
    parent, shards = loop.sharded((0, 50), (50, 90), (90, 120))
    assert (parent.state, parent.claim, parent.attempt) == (JobState.WAITING, None, 0)
    assert parent.checkpoint["sharded"]
    assert [loop.entry(shard.id).status for shard in shards] == ["ENQUEUED"] * 3
    assert {loop.entry(shard.id).queue for shard in shards} == {"autolabel_shard"}
    for ended, (shard, end) in enumerate(zip(shards, ENDS, strict=True), 1):
        run = loop.job(parent.id).run
        claimed = loop.claim(shard.id)
        loop.jobs.finish(claimed, end, ENDED)
        found = loop.job(parent.id)
        assert found.progress == pytest.approx(ended / 3)
        assert found.reason == reason(Code.SHARDS_RUN, done=ended, total=3)
        if ended < 3:
            assert (found.state, found.run) == (JobState.WAITING, run)
    assert (found.state, found.run) == (JobState.QUEUED, run + 1)
    assert loop.entry(parent.id).status == "ENQUEUED"
    again = loop.claim(parent.id)
    assert again.attempt == 1
    assert again.checkpoint["sharded"]


def test_put_back_of_a_shard_keeps_its_parent_waiting(loop: Loop) -> None:
    loop.promoted("v1")
    parent, (shard,) = loop.sharded((0, 50))
    loop.jobs.put_back(loop.claim(shard.id), CRASHED, wait=0)
    assert state_of(loop.job(parent.id)) == state_of(parent)


def test_put_back_of_the_last_shard_after_the_last_attempt_queues_its_parent(loop: Loop) -> None:
    loop.promoted("v1")
    parent, (shard,) = loop.sharded((0, 50))
    for _ in range(ATTEMPTS):
        loop.jobs.put_back(loop.claim(shard.id), CRASHED, wait=0)
    assert loop.job(shard.id).state == JobState.FAILED
    assert loop.job(parent.id).state == JobState.QUEUED


def test_recover_of_the_last_shard_after_the_last_attempt_queues_its_parent(loop: Loop) -> None:
    loop.promoted("v1")
    parent, (shard,) = loop.sharded((0, 50))
    for _ in range(ATTEMPTS):
        loop.claim(shard.id)
        loop.silent(shard.id)
        loop.jobs.recover()
    assert loop.job(shard.id).state == JobState.FAILED
    assert loop.job(parent.id).state == JobState.QUEUED


def test_claim_of_the_last_shard_after_the_last_attempt_queues_its_parent(loop: Loop) -> None:
    loop.promoted("v1")
    parent, (shard,) = loop.sharded((0, 50))
    for _ in range(ATTEMPTS):
        loop.claim(shard.id)
    # The queue starts the run once more, since its worker died again.
    assert loop.jobs.claim(shard.id, shard.run, "host-b") is None
    assert loop.job(shard.id).state == JobState.FAILED
    assert loop.job(parent.id).state == JobState.QUEUED


def test_finish_of_shards_at_once_queues_their_parent_exactly_once(loop: Loop) -> None:
    loop.promoted("v1")
    parent, shards = loop.sharded(*((n, n + 10) for n in range(0, 80, 10)))
    claimed = [loop.claim(shard.id) for shard in shards]
    with ThreadPoolExecutor(8) as pool:
        ends = [pool.submit(loop.jobs.finish, job, JobState.DONE, ENDED) for job in claimed]
        for end in ends:
            end.result()
    found = loop.job(parent.id)
    assert (found.state, found.run) == (JobState.QUEUED, parent.run + 1)
    assert found.reason == reason(Code.SHARDS_RUN, done=8, total=8)


def test_metrics_auto_labelling_in_shards_counts_each_prediction_once(loop: Loop) -> None:
    card = {"metrics": {"map50": 0.5}}
    live = Verdict(True, reason(Code.FIRST_VERSION, ap50=0.5))
    record_version(
        loop.backend.versions, loop.database, loop.project_id, "v1", card, live, parent=None
    )
    parent, shards = loop.sharded((0, 50), (50, 90), (90, 120))
    work = [(50, 50, 0), (40, 38, 2), (20, 20, 0)]
    for shard, (done, imported, left_out) in zip(shards, work, strict=True):
        claimed = loop.claim(shard.id)
        reached = AutolabelCheckpoint(version="v1", done=done, imported=imported, left_out=left_out)
        loop.jobs.advance(claimed, 1.0, ENDED, reached.stored(), "v1")
        if shard is not shards[-1]:
            loop.jobs.finish(claimed, JobState.DONE, ENDED)
    # The last shard still runs.
    assert _counted(loop) == {
        ("predictions", "autolabel"): 0,
        ("predictions", "autolabel_shard"): 108,
        ("image_failures", "autolabel"): 0,
        ("image_failures", "autolabel_shard"): 2,
    }
    loop.jobs.finish(claimed, JobState.DONE, ENDED)
    # The parent predicts the tasks that have arrived meanwhile, and counts only these.
    again = loop.claim(parent.id)
    reached = AutolabelCheckpoint.model_validate(again.checkpoint)
    reached.done, reached.imported = 5, 4
    loop.jobs.advance(again, 1.0, ENDED, reached.stored(), "v1")
    loop.jobs.finish(again, JobState.DONE, ENDED)
    assert _counted(loop) == {
        ("predictions", "autolabel"): 4,
        ("predictions", "autolabel_shard"): 108,
        ("image_failures", "autolabel"): 0,
        ("image_failures", "autolabel_shard"): 2,
    }


def _counted(loop: Loop) -> dict[tuple[str, str], float]:
    text = create_app(loop.backend).test_client().get("/metrics").text
    return {(name, kind): float(count) for name, kind, count in PREDICTIONS.findall(text)}
