"""When a training starts: a pure function of what is known, answered in words."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

PATIENCE = 5
"""Annotators who never pause put a training off by this many quiet times at most."""


@dataclass(frozen=True, slots=True)
class Situation:
    """What the decision rests on.

    Attributes:
        annotated: tasks with an annotation to learn from.
        changes: annotations new or changed since the newest training began.
        last_change: when one last changed.
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
    """What to do, and why in words.

    Attributes:
        action: `wait` for more annotations, `pause` until `at`, `start`, or `refuse`.
        reason: a sentence for people.
        at: when to look again, for `pause`.
    """

    action: Literal["wait", "pause", "start", "refuse"]
    reason: str
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
        situation: what is known.
        moment: now.
        every: new or changed annotations that start a training,
        growth: or this share of the annotated tasks, where that is more.
        minimum: annotated tasks needed for the first.
        delay: quiet seconds before it starts.
        forced: somebody asked for it: it starts at once if it can at all.
    """
    if forced:
        if situation.annotated < 2:
            return Decision(
                "refuse",
                f"refused because a training needs at least 2 annotated tasks and there "
                f"{_are(situation.annotated)}: annotate some and ask again",
            )
        return Decision("start", f"asked for, with {_tasks(situation.annotated)}")
    if not situation.trained_before and situation.annotated < minimum:
        missing = minimum - situation.annotated
        return Decision(
            "wait",
            f"waiting for {missing} more annotated {'task' if missing == 1 else 'tasks'} before "
            f"the first training ({situation.annotated} of {minimum})",
        )
    before = max(0, situation.annotated - situation.changes)
    needed = changes_needed(before, every=every, growth=growth)
    if situation.trained_before and situation.changes < needed:
        missing = needed - situation.changes
        return Decision(
            "wait",
            f"waiting for {missing} more new or changed "
            f"{'annotation' if missing == 1 else 'annotations'} ({situation.changes} of {needed})",
        )
    quiet_at = moment
    if situation.last_change is not None:
        quiet_at = situation.last_change + timedelta(seconds=delay)
    latest = (situation.enough_since or moment) + timedelta(seconds=PATIENCE * delay)
    start_at = min(quiet_at, latest)
    if start_at > moment:
        return Decision(
            "pause",
            f"quiet time: starts at {start_at:%H:%M:%S} UTC unless annotations go on arriving "
            f"(at {latest:%H:%M:%S} UTC in any case)",
            at=start_at,
        )
    return Decision(
        "start",
        f"{situation.changes} new or changed annotations, {_tasks(situation.annotated)}",
    )


def changes_needed(before: int, *, every: int, growth: float) -> int:
    """New or changed annotations that start the next training.

    Args:
        before: annotated tasks that the newest training saw.
        every: so many, or
        growth: this share of them, where that is more.
    """
    return max(every, math.ceil(growth * before))


def _tasks(count: int) -> str:
    return f"{count} annotated {'task' if count == 1 else 'tasks'}"


def _are(count: int) -> str:
    return {0: "are none", 1: "is 1"}.get(count, f"are {count}")
