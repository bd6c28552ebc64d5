"""Holds the results of simulated campaigns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ml_backend.reasons import Reason

OnProgress = Callable[[float, Reason], None]
"""Receives the fraction done, in `[0, 1]`, and its reason; may raise to stop."""


@dataclass(frozen=True, slots=True)
class Round:
    """One training of a campaign, or one live head.

    Attributes:
        images: number of images that were labelled by then.
        promoted: whether the new version went live.
        reason: why.
        map50: mean AP50 as the training itself measured it.
        map50_of_rest: mean AP50 of the live version on the images that are not labelled yet.
        ap50_of_rest: the same by label; None for a label without a box on those images.
        seconds: duration of training, measuring and predicting.
        is_live_head: whether a live head was fitted, and no detector trained.
    """

    images: int
    promoted: bool
    reason: Reason
    map50: float
    map50_of_rest: float
    ap50_of_rest: dict[str, float | None]
    seconds: float
    is_live_head: bool


OnRound = Callable[[str, int, Round], None]
"""Receives the name of a campaign, its seed, and a round that has ended."""


@dataclass(frozen=True, slots=True)
class Campaign:
    """The result of a campaign.

    Attributes:
        name: name of the strategy, or of another kind of campaign.
        seed: seed of the order of images.
        human: cumulative seconds of the annotator after each image, by price of a box.
        by_hand: the same if every box is drawn by hand, by price of a box.
        rounds: the trainings.
        machine: seconds that all trainings took.
    """

    name: str
    seed: int
    human: dict[float, list[float]]
    by_hand: dict[float, list[float]]
    rounds: list[Round]
    machine: float

    def saving(self, price: float) -> float:
        """Divides the seconds of work by hand by the seconds that the annotator worked."""
        return self.by_hand[price][-1] / self.human[price][-1]
