"""Decides when a training starts: a pure function of what is known of a project."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from ml_backend.reasons import Code, Reason, reason

PATIENCE = 5
"""Quiet times by which annotators who never pause can put a training off, at most."""
FEWEST = 2
"""Annotated tasks without which no training is possible: one to learn from, one to measure on."""


class Action(StrEnum):
    """What becomes of a training."""

    WAIT = "wait"
    """For more annotations."""
    PAUSE = "pause"
    """Until the quiet time is over."""
    START = "start"
    REFUSE = "refuse"


@dataclass(frozen=True, slots=True)
class Situation:
    """The facts that a decision rests on.

    Attributes:
        annotated: tasks with an annotation to learn from.
        changes: annotations new or changed since the newest training began.
        last_change: when an annotation last changed.
        enough_since: when the changes first sufficed for a training; None where not yet known.
        trained_before: whether a training has been through.
    """

    annotated: int
    changes: int
    last_change: datetime | None
    enough_since: datetime | None
    trained_before: bool


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do, and why.

    Attributes:
        action: what to do.
        reason: why.
        at: when to decide again, for `PAUSE`.
    """

    action: Action
    reason: Reason
    at: datetime | None = None


def decide(
    situation: Situation,
    *,
    moment: datetime,
    every: int,
    growth: float,
    minimum: int,
    delay: float,
    forced: bool = False,
) -> Decision:
    """Decides whether a training starts.

    Args:
        situation: the facts.
        moment: now.
        every: new or changed annotations that start a training,
        growth: or this share of the annotated tasks, where that is more.
        minimum: annotated tasks needed for the first training.
        delay: quiet seconds before a training starts.
        forced: somebody asked for the training: it starts at once if it can at all.
    """
    if forced:
        return _asked_for(situation)
    if not situation.trained_before and situation.annotated < minimum:
        return Decision(
            Action.WAIT,
            reason(Code.FIRST_TRAINING_WAITS, annotated=situation.annotated, minimum=minimum),
        )
    before = max(0, situation.annotated - situation.changes)
    needed = changes_needed(before, every=every, growth=growth)
    if situation.trained_before and situation.changes < needed:
        return Decision(
            Action.WAIT, reason(Code.CHANGES_AWAITED, changes=situation.changes, needed=needed)
        )
    quiet_at = moment
    if situation.last_change is not None:
        quiet_at = situation.last_change + timedelta(seconds=delay)
    latest = (situation.enough_since or moment) + timedelta(seconds=PATIENCE * delay)
    start_at = min(quiet_at, latest)
    if start_at > moment:
        why = reason(Code.QUIET_TIME, at=start_at.isoformat(), latest=latest.isoformat())
        return Decision(Action.PAUSE, why, at=start_at)
    return Decision(
        Action.START,
        reason(Code.ENOUGH_CHANGES, changes=situation.changes, annotated=situation.annotated),
    )


def changes_needed(before: int, *, every: int, growth: float) -> int:
    """Counts the new or changed annotations that start the next training.

    Args:
        before: annotated tasks that the newest training saw.
        every: so many changes, or
        growth: this share of `before`, where that is more.
    """
    return max(every, math.ceil(growth * before))


def _asked_for(situation: Situation) -> Decision:
    if situation.annotated < FEWEST:
        return Decision(
            Action.REFUSE,
            reason(Code.TOO_FEW_ANNOTATED, annotated=situation.annotated, needed=FEWEST),
        )
    return Decision(Action.START, reason(Code.ASKED_FOR, annotated=situation.annotated))
