"""Asking for live heads: one after each annotation, until a trained version is live."""

from __future__ import annotations

import pytest

from ml_backend.jobs.jobs import Asked
from ml_backend.reasons import Code, reason
from ml_backend.store.states import JobKind, JobState
from ml_backend.training.promotion import Verdict
from ml_backend.wording import words
from tests.conftest import record_version
from tests.job_loop import Loop, MakeLoop


def _consider(loop: Loop) -> Asked | None:
    return loop.backend.live_heads.consider(loop.project_id)


def _go_live(loop: Loop, name: str, kind: JobKind) -> None:
    record_version(
        loop.backend.versions,
        loop.database,
        loop.project_id,
        name,
        {"kind": kind},
        Verdict(True, reason(Code.FIRST_VERSION, ap50=0.5)),
        parent=loop.project().live_version,
    )


def test_consider_third_annotated_task_asks_once(make_loop: MakeLoop) -> None:
    loop = make_loop()
    loop.annotate(range(1, 3))
    assert _consider(loop) is None
    loop.annotate(range(3, 4))
    asked = _consider(loop)
    assert asked is not None
    assert (asked.state, words(asked.reason)) == (
        JobState.QUEUED,
        "annotations changed, 3 annotated tasks",
    )
    assert loop.entry(asked.job).queue == "live_head"
    # It will see what changes until it starts.
    loop.annotate(range(4, 5))
    assert _consider(loop) is None


def test_consider_change_during_the_fit_asks_again_after_it(make_loop: MakeLoop) -> None:
    loop = make_loop()
    loop.annotate(range(1, 4))
    asked = _consider(loop)
    assert asked is not None
    job = loop.claim(asked.job)
    loop.annotate(range(4, 5))
    assert _consider(loop) is None
    loop.jobs.finish(job, JobState.DONE, reason(Code.NONE))
    again = _consider(loop)
    assert again is not None
    loop.jobs.finish(loop.claim(again.job), JobState.REFUSED, reason(Code.NO_BOXES))
    # Nothing has changed: it would be refused for ever.
    assert _consider(loop) is None


def test_consider_live_head_is_live_goes_on_until_a_trained_version_is(
    make_loop: MakeLoop,
) -> None:
    loop = make_loop()
    loop.annotate(range(1, 4))
    _go_live(loop, "v1-live", JobKind.LIVE_HEAD)
    assert _consider(loop) is not None
    loop.jobs.finish(loop.claim(1), JobState.DONE, reason(Code.NONE))
    _go_live(loop, "v2", JobKind.TRAIN)
    loop.annotate(range(4, 5))
    assert _consider(loop) is None


@pytest.mark.parametrize("settings", [{"ML_BACKEND_LIVE_MIN": "0"}, {"ML_BACKEND_WEIGHTS": "none"}])
def test_consider_turned_off_or_without_weights_asks_for_nothing(
    make_loop: MakeLoop, settings: dict[str, str]
) -> None:
    loop = make_loop(**settings)
    loop.annotate(range(1, 9))
    assert _consider(loop) is None
