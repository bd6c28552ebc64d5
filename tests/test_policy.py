"""When a training starts, and what people are told."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from ml_backend.jobs.schedule import PATIENCE, Decision, Situation, decide

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


def test_the_first_training_waits_for_enough_tasks() -> None:
    decision = _decide(annotated=8, trained_before=False)
    assert decision.action == "wait"
    assert "4 more annotated tasks" in decision.reason


def test_the_next_training_waits_for_enough_changes() -> None:
    decision = _decide(changes=9)
    assert decision.action == "wait"
    assert "1 more new or changed annotation " in decision.reason


def test_where_much_is_annotated_a_training_waits_for_a_share_of_it() -> None:
    decision = _decide(annotated=240, changes=40)
    assert decision.action == "wait"
    assert "10 more new or changed annotations (40 of 50)" in decision.reason
    assert _decide(annotated=250, changes=50).action == "start"


def test_it_waits_for_quiet_and_then_starts() -> None:
    decision = _decide(quiet=10)
    assert decision.action == "pause"
    assert decision.at == MOMENT + timedelta(seconds=20)
    assert _decide(quiet=30).action == "start"


def test_annotators_who_never_pause_do_not_put_it_off_for_ever() -> None:
    assert _decide(quiet=1, enough_for=30 * PATIENCE - 5).action == "pause"
    assert _decide(quiet=1, enough_for=30 * PATIENCE).action == "start"


def test_asked_for_it_starts_at_once_or_says_why_not() -> None:
    assert _decide(annotated=2, changes=0, trained_before=False, forced=True).action == "start"
    refused = _decide(annotated=1, changes=0, trained_before=False, forced=True)
    assert refused.action == "refuse"
    assert "there is 1" in refused.reason
