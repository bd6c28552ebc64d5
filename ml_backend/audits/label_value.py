"""Estimates the value of further labels, and when to stop labelling.

Three signs tell: the slope of the learning curve, the share of predicted boxes that people leave
untouched, and whether successive versions still differ on the same images (stabilising predictions;
Bloodgood and Vijay-Shanker, 2009).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ml_backend.jobs.schedule import changes_needed
from ml_backend.reasons import Reason
from ml_backend.store.tables import is_live_head

NEEDED = 3
"""Trainings from which a curve has a slope that tells something."""
RECENT = 6
"""Trainings that the curve is drawn through: early ones rise faster than any later one."""
LITTLE = 0.01
"""AP50 that is little: nobody labels for a gain that surely stays below it."""
ALIKE = 0.95
"""Agreement from which successive versions count as the same."""
UNTOUCHED = 0.9
"""Share of boxes left untouched from which people correct next to nothing."""
_Z = 1.645
"""Of a 90 % interval."""
_NOISE = 0.02
"""AP50 by which two trainings on the same images may differ."""


@dataclass(frozen=True, slots=True)
class Version:
    """Holds the fields of a version that tell of the value of labels.

    Attributes:
        images: that it learned from or was measured on.
        map50: mean AP50, as it was measured.
        low: lower end of its 90 % interval.
        high: upper end of its 90 % interval.
        agreement: how alike it and the one that was live then are, in `[0, 1]`.
    """

    images: int
    map50: float
    low: float
    high: float
    agreement: float | None

    @classmethod
    def of(cls, card: Mapping[str, Any]) -> Version | None:
        """Reads a model card; None where it lacks a field, or is a live head's.

        Live heads have a learning curve of their own, which trained versions do not go on with.
        """
        if is_live_head(card):
            return None
        images, metrics = card.get("data", {}).get("images"), card.get("metrics", {})
        interval = metrics.get("map50_interval")
        if not images or interval is None:
            return None
        return cls(
            images, metrics["map50"], interval["low"], interval["high"], card.get("agreement")
        )


@dataclass(frozen=True, slots=True)
class LabelValue:
    """Holds the value of further labels.

    Attributes:
        gain: mean AP50 that `images` more labelled images will add, most likely; None where that
            cannot be told yet.
        low: lower end of its 90 % interval.
        high: upper end of its 90 % interval.
        images: how many more.
        untouched: share of predicted boxes that people left as they were.
        agreement: of the newest two versions.
        stop: whether more labels teach little.
        reason: all that, and the advice.
    """

    gain: float | None
    low: float | None
    high: float | None
    images: int
    untouched: float | None
    agreement: float | None
    stop: bool
    reason: Reason

    def as_dict(self) -> dict[str, Any]:
        """Returns the numbers as JSON holds them, without the reason."""
        return {name: getattr(self, name) for name in self.__slots__ if name != "reason"}


def value_of_labels(
    versions: Sequence[Version], *, more: int, untouched: float | None
) -> LabelValue:
    """Estimates the value of further labels.

    The mean AP50 is taken to rise by the same amount with each doubling of the images, over the
    newest `RECENT` trainings (weighted least squares; each weighs by its interval).

    Args:
        versions: oldest first, whether they went live or not.
        more: images that the next training will have seen more.
        untouched: share of predicted boxes that people left as they were, where it is known.
    """
    recent = list(versions)[-RECENT:]
    agreement = recent[-1].agreement if recent else None
    signs = {"untouched": untouched, "agreement": agreement}
    if len(recent) < NEEDED or len({v.images for v in recent}) < 2:
        missing = max(1, NEEDED - len(recent))
        reason = Reason("label_value.too_early", {"missing": missing, **signs})
        return LabelValue(None, None, None, more, untouched, agreement, False, reason)
    slope, error = _slope(recent)
    doublings = math.log2((recent[-1].images + more) / recent[-1].images)
    gain = slope * doublings
    low, high = (gain + sign * _Z * error * doublings for sign in (-1, 1))
    settled = agreement is not None and agreement >= ALIKE
    nods = untouched is None or untouched >= UNTOUCHED
    if high < LITTLE:
        advice = "stop" if settled and nods else "correcting" if settled else "unsettled"
    else:
        advice = "go_on" if low > 0 else "noise"
    values = {"images": more, "gain": gain, "low": low, "high": high, **signs}
    reason = Reason(f"label_value.{advice}", values)
    return LabelValue(gain, low, high, more, untouched, agreement, advice == "stop", reason)


def more_images(versions: Sequence[Version], *, every: int, growth: float) -> int:
    """Computes how many images more the next training will have seen, by the policy.

    Args:
        versions: oldest first.
        every: new annotations that start a training, or
        growth: this share of what was annotated, where that is more.
    """
    return changes_needed(versions[-1].images if versions else 0, every=every, growth=growth)


def _slope(versions: Sequence[Version]) -> tuple[float, float]:
    """Fits the AP50 gained with each doubling of the images; also gives its standard error."""
    x = np.log2([v.images for v in versions])
    y = np.array([v.map50 for v in versions])
    deviation = np.array([math.hypot((v.high - v.low) / (2 * _Z), _NOISE) for v in versions])
    design = np.stack([np.ones_like(x), x], 1) / deviation[:, None]
    covariance = np.linalg.inv(design.T @ design)
    coefficients = covariance @ design.T @ (y / deviation)
    return float(coefficients[1]), float(math.sqrt(covariance[1, 1]))
