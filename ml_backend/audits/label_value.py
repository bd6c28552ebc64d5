"""What the next labels are worth, and when to stop, in words.

Three signs: the slope of the learning curve, what people leave untouched of what is predicted, and
whether successive versions still differ on the same images (stabilising predictions; Bloodgood and
Vijay-Shanker, 2009).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ml_backend.jobs.schedule import changes_needed

NEEDED = 3
"""Trainings from which a curve has a slope worth telling."""
RECENT = 6
"""Trainings that the curve is drawn through: early ones rise faster than any later one."""
LITTLE = 0.01
"""AP50 that is little: a gain that surely stays below it is not worth labelling for."""
ALIKE = 0.95
"""Agreement from which successive versions count as the same."""
UNTOUCHED = 0.9
"""Share of boxes left untouched from which people only nod."""
_Z = 1.645
"""Of a 90 % interval."""
_NOISE = 0.02
"""AP50 by which two trainings on the same images may differ."""


@dataclass(frozen=True, slots=True)
class Version:
    """A version, as far as it tells what labels are worth.

    Attributes:
        images: that it learned from or was measured on.
        map50: mean AP50, as it was measured, and
        low: its 90 % interval's lower end, and
        high: upper end.
        agreement: how alike it and the one that was live then are, in `[0, 1]`.
    """

    images: int
    map50: float
    low: float
    high: float
    agreement: float | None

    @classmethod
    def of(cls, card: Mapping[str, Any]) -> Version | None:
        """From a model card; None where it does not say enough."""
        images, metrics = card.get("data", {}).get("images"), card.get("metrics", {})
        interval = metrics.get("map50_interval")
        if not images or interval is None:
            return None
        return cls(
            images, metrics["map50"], interval["low"], interval["high"], card.get("agreement")
        )


@dataclass(frozen=True, slots=True)
class Worth:
    """What the next labels are worth.

    Attributes:
        gain: mean AP50 that `images` more labelled images will add, most likely; None where that
            cannot be told yet.
        low: its 90 % interval's lower end.
        high: its upper end.
        images: how many more.
        untouched: share of predicted boxes that people left as they were.
        agreement: of the newest two versions.
        stop: whether more labels teach little.
        words: all that, for people.
    """

    gain: float | None
    low: float | None
    high: float | None
    images: int
    untouched: float | None
    agreement: float | None
    stop: bool
    words: str


def worth_of(versions: Sequence[Version], *, more: int, untouched: float | None) -> Worth:
    """Judges what the next labels are worth.

    The mean AP50 is taken to rise by the same amount with each doubling of the images, over the
    newest `RECENT` trainings (weighted least squares; each weighs by its interval).

    Args:
        versions: oldest first, whether they went live or not.
        more: images that the next training will have seen more.
        untouched: share of predicted boxes that people left as they were, where it is known.
    """
    recent = list(versions)[-RECENT:]
    agreement = recent[-1].agreement if recent else None
    signs = _signs(untouched, agreement)
    if len(recent) < NEEDED or len({v.images for v in recent}) < 2:
        missing = max(1, NEEDED - len(recent))
        words = f"too early to say what the next labels are worth: {missing} more " + (
            "training tells" if missing == 1 else "trainings tell"
        )
        return Worth(None, None, None, more, untouched, agreement, False, words + signs)
    slope, error = _slope(recent)
    doublings = math.log2((recent[-1].images + more) / recent[-1].images)
    gain = slope * doublings
    low, high = (gain + sign * _Z * error * doublings for sign in (-1, 1))
    settled = agreement is not None and agreement >= ALIKE
    nods = untouched is None or untouched >= UNTOUCHED
    stop = high < LITTLE and settled and nods
    if stop:
        advice = "more labels teach little: it is time to stop, or to look for images that differ"
    elif high < LITTLE:
        advice = "more labels raise the score little, but " + (
            "versions still differ" if not settled else "people still correct much"
        )
    elif low > 0:
        advice = "go on"
    else:
        advice = "go on: whether it still rises cannot be told from the noise"
    words = (
        f"the next {more} images are worth {100 * gain:+.1f} points of AP50 "
        f"({100 * low:+.1f} to {100 * high:+.1f}, 90 %)"
    )
    return Worth(gain, low, high, more, untouched, agreement, stop, f"{words}{signs}; {advice}")


def more_images(versions: Sequence[Version], *, every: int, growth: float) -> int:
    """Images that the next training will have seen more, by the policy.

    Args:
        versions: oldest first.
        every: new annotations that start a training, or
        growth: this share of what was annotated, where that is more.
    """
    return changes_needed(versions[-1].images if versions else 0, every=every, growth=growth)


def _slope(versions: Sequence[Version]) -> tuple[float, float]:
    """AP50 for each doubling of the images, and its standard error."""
    x = np.log2([v.images for v in versions])
    y = np.array([v.map50 for v in versions])
    deviation = np.array([math.hypot((v.high - v.low) / (2 * _Z), _NOISE) for v in versions])
    design = np.stack([np.ones_like(x), x], 1) / deviation[:, None]
    covariance = np.linalg.inv(design.T @ design)
    coefficients = covariance @ design.T @ (y / deviation)
    return float(coefficients[1]), float(math.sqrt(covariance[1, 1]))


def _signs(untouched: float | None, agreement: float | None) -> str:
    said = ""
    if untouched is not None:
        said += f"; people leave {untouched:.0%} of the boxes untouched"
    if agreement is not None:
        said += f"; the newest two versions agree in {agreement:.0%} of their boxes"
    return said
