"""When a training starts, and which reason is given."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from ml_backend.jobs.schedule import FEWEST, PATIENCE, Action, Decision, Situation, decide
from ml_backend.reasons import Code, reason
from ml_backend.wording import words

MOMENT = datetime(2026, 1, 1, 12, 0, tzinfo=UTC)


def _decide(
    *,
    annotated: int = 20,
    changes: int = 20,
    quiet: float = 60,
    enough_for: float | None = None,
    trained_before: bool = True,
    forced: bool = False,
) -> Decision:
    situation = Situation(
        annotated=annotated,
        changes=changes,
        last_change=MOMENT - timedelta(seconds=quiet),
        enough_since=None if enough_for is None else MOMENT - timedelta(seconds=enough_for),
        trained_before=trained_before,
    )
    return decide(
        situation, moment=MOMENT, every=10, growth=0.25, minimum=12, delay=30, forced=forced
    )


def test_decide_first_training_with_too_few_tasks_waits() -> None:
    decision = _decide(annotated=8, trained_before=False)
    assert decision.action == Action.WAIT
    assert decision.reason == reason(Code.FIRST_TRAINING_WAITS, annotated=8, minimum=12)
    assert "4 more annotated tasks" in words(decision.reason)


def test_decide_first_training_with_the_minimum_starts() -> None:
    decision = _decide(annotated=12, changes=12, trained_before=False)
    assert decision.action == Action.START
    assert decision.reason == reason(Code.ENOUGH_CHANGES, changes=12, annotated=12)


def test_decide_next_training_with_too_few_changes_waits() -> None:
    decision = _decide(changes=9)
    assert decision.action == Action.WAIT
    assert decision.reason == reason(Code.CHANGES_AWAITED, changes=9, needed=10)
    assert "1 more new or changed annotation " in words(decision.reason)


def test_decide_many_annotated_tasks_waits_for_a_share_of_them() -> None:
    decision = _decide(annotated=240, changes=40)
    assert decision.action == Action.WAIT
    assert decision.reason == reason(Code.CHANGES_AWAITED, changes=40, needed=50)
    assert "10 more new or changed annotations (40 of 50)" in words(decision.reason)
    assert _decide(annotated=250, changes=50).action == Action.START


def test_decide_within_the_quiet_time_pauses_until_its_end() -> None:
    decision = _decide(quiet=10)
    assert decision.action == Action.PAUSE
    assert decision.at == MOMENT + timedelta(seconds=20)
    assert decision.reason.code == Code.QUIET_TIME
    assert words(decision.reason).startswith("quiet time: starts at 12:00:20 UTC")
    assert _decide(quiet=30).action == Action.START


def test_decide_annotators_never_pause_starts_after_five_quiet_times() -> None:
    assert _decide(quiet=1, enough_for=30 * PATIENCE - 5).action == Action.PAUSE
    assert _decide(quiet=1, enough_for=30 * PATIENCE).action == Action.START


def test_decide_forced_starts_within_the_quiet_time() -> None:
    decision = _decide(annotated=2, changes=0, quiet=1, trained_before=False, forced=True)
    assert decision.action == Action.START
    assert decision.reason == reason(Code.ASKED_FOR, annotated=2)


def test_decide_forced_with_too_few_tasks_refuses() -> None:
    decision = _decide(annotated=1, changes=0, trained_before=False, forced=True)
    assert decision.action == Action.REFUSE
    assert decision.reason == reason(Code.TOO_FEW_ANNOTATED, annotated=1, needed=FEWEST)
    assert "there is 1" in words(decision.reason)
