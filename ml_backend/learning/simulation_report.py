"""Runs the campaigns that were asked for, and says what they came to."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.markup import escape
from rich.table import Table

from ml_backend.detection.device import resolve_device
from ml_backend.learning.acquisition import STRATEGIES
from ml_backend.learning.datasets import LabelledData
from ml_backend.learning.simulation import FIRST, Campaign, Simulation, Tell
from ml_backend.settings import Settings


@dataclass(frozen=True, slots=True)
class Plan:
    """Which campaigns are run.

    Attributes:
        strategies: names in `acquisition.STRATEGIES`.
        seeds: one campaign of each strategy for each.
        prices: seconds that drawing a box takes.
        story: whether one round after the first images is run as well, for each seed.
        stop_after: images after which each ends; None for all.
    """

    strategies: tuple[str, ...]
    seeds: tuple[int, ...]
    prices: tuple[float, ...]
    story: bool
    stop_after: int | None

    def __post_init__(self) -> None:
        for name in self.strategies:
            if name not in STRATEGIES:
                raise ValueError(f"there is no strategy {name!r}: {', '.join(STRATEGIES)}")
        if not all(0 < price < 3600 for price in self.prices):
            raise ValueError("prices must be seconds, more than 0")
        if self.stop_after is not None and self.stop_after < 1:
            raise ValueError("stop-after must be at least 1")


def run(plan: Plan, settings: Settings, data: LabelledData, on_progress: Tell) -> list[Campaign]:
    """Runs the campaigns of a plan, one after the other.

    Args:
        plan: which.
        settings: as of a live project; trainings take all cores where it does not say how many.
        data: labelled images.
        on_progress: told the fraction of all that is done, and a sentence.
    """
    if settings.train_threads is None:
        settings = settings.model_copy(update={"train_threads": os.cpu_count()})
    first = min(FIRST, max(2, len(data.samples) // 2))
    total = len(plan.seeds) * (len(plan.strategies) + plan.story)
    campaigns: list[Campaign] = []

    def tell(fraction: float, words: str) -> None:
        on_progress((len(campaigns) + fraction) / total, f"{len(campaigns) + 1}/{total}: {words}")

    simulation = Simulation(
        settings, resolve_device(settings.device), data.labels, data.samples, plan.prices, tell
    )
    for seed in plan.seeds:
        for strategy in plan.strategies:
            campaigns.append(simulation.loop(strategy, seed, stop_after=plan.stop_after))
        if plan.story:
            campaigns.append(simulation.one_round(seed, first=first))
    return campaigns


def summary_table(plan: Plan, campaigns: Sequence[Campaign]) -> Table:
    """The campaigns, a row each, for the terminal."""
    table = Table("campaign", "seed", "trainings", "machine", "AP50 of the rest")
    for price in plan.prices:
        table.add_column(f"people, {price:g} s a box", justify="right")
        table.add_column("less by", justify="right")
    hand = campaigns[0].by_hand
    table.add_row(
        *("by hand", "", "0", "", ""),
        *(text for p in plan.prices for text in (_hours(hand[p][-1]), "")),
    )
    for one in campaigns:
        curve = " ".join(f"{r.images}: {r.map50_of_rest:.2f}" for r in one.rounds)
        table.add_row(
            *(escape(one.name), str(one.seed), str(len(one.rounds)), _hours(one.machine), curve),
            *(
                text
                for p in plan.prices
                for text in (_hours(one.human[p][-1]), f"{one.saving(p):.2f} ×")
            ),
        )
    return table


def as_dict(plan: Plan, data: LabelledData, campaigns: Sequence[Campaign]) -> dict[str, Any]:
    """The same and more, for programs."""
    return {
        "images": len(data.samples),
        "boxes": sum(len(s.labels) for s in data.samples),
        "labels": list(data.labels),
        "left_out": data.left_out,
        "prices": list(plan.prices),
        "cores": os.cpu_count(),
        "campaigns": [
            {**dataclasses.asdict(c), "saving": {p: round(c.saving(p), 3) for p in plan.prices}}
            for c in campaigns
        ],
    }


def _hours(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d} h"
