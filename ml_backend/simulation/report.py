"""Runs the campaigns of a plan, and reports their results."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.markup import escape
from rich.table import Column, Table

from ml_backend.datasets.types import DatasetError, LabelledData
from ml_backend.detection.decoding import UndecodableImage, decode_image
from ml_backend.detection.device import resolve_device
from ml_backend.detection.types import Sample
from ml_backend.extensions import STRATEGIES
from ml_backend.machine import usable_cores
from ml_backend.reasons import Code, Reason, reason
from ml_backend.settings import Settings
from ml_backend.simulation.campaign import ONE_ROUND_IMAGES, Simulation
from ml_backend.simulation.results import Campaign, OnProgress, OnRound, Round
from ml_backend.training.outcome import cost_model

_log = logging.getLogger(__name__)
_MAX_PRICES = 4
"""Each price takes a column of the table, and a terminal has no room for more."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Names the campaigns to run.

    Attributes:
        strategies: names in `ml_backend.extensions.STRATEGIES`.
        seeds: every strategy gets one campaign for each seed.
        prices: seconds that drawing a box takes.
        story: whether a campaign with a single training is run as well, for each seed.
        stop_after: number of images after which a campaign ends; None for all images.

    Raises:
        ValueError: a value is wrong; the text names the command's option.
    """

    strategies: tuple[str, ...]
    seeds: tuple[int, ...]
    prices: tuple[float, ...]
    story: bool
    stop_after: int | None

    def __post_init__(self) -> None:
        for what, values in (("strategies", self.strategies), ("seeds", self.seeds)):
            if len(set(values)) < len(values):
                raise ValueError(f"{what}: each once, please")
        if not 1 <= len(set(self.prices)) == len(self.prices) <= _MAX_PRICES:
            raise ValueError(f"prices: 1 to {_MAX_PRICES} of them, each once")
        for name in self.strategies:
            if name not in STRATEGIES:
                raise ValueError(
                    f"there is no strategy {name!r}: it must be one of {', '.join(STRATEGIES)}"
                )
        if not all(0 < price < 3600 for price in self.prices):
            raise ValueError("prices must be seconds, more than 0")
        if self.stop_after is not None and self.stop_after < 1:
            raise ValueError("stop-after must be at least 1")


def keep_decodable(data: LabelledData, settings: Settings, on_progress: OnProgress) -> LabelledData:
    """Leaves out the images that cannot be decoded, so that no campaign fails in its middle.

    Raises:
        DatasetError: too few images are left for a training.
    """
    samples: list[Sample] = []
    left_out = Counter(data.left_out)
    for number, sample in enumerate(data.samples):
        on_progress(
            number / len(data.samples),
            reason(Code.READING_IMAGES, done=number, total=len(data.samples)),
        )
        try:
            decode_image(sample.image, max_pixels=settings.image_max_pixels)
        except (UndecodableImage, OSError) as error:
            _log.warning("%s: %s", sample.key, error)
            left_out["the image cannot be decoded"] += 1
        else:
            samples.append(sample)
    if len(samples) <= settings.train_min:
        raise DatasetError(
            f"the data set has {len(samples)} images that can be used, and a first training takes "
            f"{settings.train_min} (ML_BACKEND_TRAIN_MIN): give one with more"
        )
    return dataclasses.replace(data, samples=tuple(samples), left_out=dict(left_out))


def run(
    plan: Plan,
    settings: Settings,
    data: LabelledData,
    on_progress: OnProgress,
    on_round: OnRound,
) -> Iterator[Campaign]:
    """Runs the campaigns of a plan, one after the other, and yields each as it ends.

    Args:
        plan: names the campaigns.
        settings: those of a live project; without `train_threads`, trainings take all cores.
        data: labelled images, all of which can be decoded.
        on_progress: receives the fraction of the whole plan that is done, and the present stage.
        on_round: receives the campaign's name, its seed, and every round as it ends.
    """
    if settings.train_threads is None:
        settings = settings.model_copy(update={"train_threads": usable_cores()})
    first = min(ONE_ROUND_IMAGES, max(2, len(data.samples) // 2))
    total = len(plan.seeds) * (len(plan.strategies) + plan.story)
    done = 0

    def tell(fraction: float, stage: Reason) -> None:
        why = reason(Code.CAMPAIGN, number=done + 1, total=total, stage=stage)
        on_progress((done + fraction) / total, why)

    simulation = Simulation(
        settings,
        resolve_device(settings.device),
        data.labels,
        data.samples,
        plan.prices,
        tell,
        on_round,
    )
    for seed in plan.seeds:
        for strategy in plan.strategies:
            yield simulation.loop(strategy, seed, stop_after=plan.stop_after)
            done += 1
        if plan.story:
            yield simulation.one_round(seed, first=first)
            done += 1
    on_progress(1.0, reason(Code.CAMPAIGNS_DONE, total=total))


def summary_table(plan: Plan, campaigns: Sequence[Campaign]) -> Table:
    """Makes a table of the campaigns, a row each, for the terminal."""
    table = Table(Column("campaign", no_wrap=True), "seed", Column("machine", no_wrap=True))
    for price in plan.prices:
        table.add_column(f"{price:g} s a box", justify="right", no_wrap=True)
    # A campaign may have been stopped early: the longest one says what all images cost by hand.
    hand = [_duration(max(one.by_hand[p][-1] for one in campaigns)) for p in plan.prices]
    table.add_row("all by hand", "", "", *hand)
    for one in campaigns:
        table.add_row(
            *(escape(one.name), str(one.seed), _duration(one.machine)),
            *(f"{_duration(one.human[p][-1])}, {one.saving(p):.2f} ×" for p in plan.prices),
        )
    return table


def describe_round(campaign: str, seed: int, finished: Round) -> str:
    """Describes the result of one training or live head, in a line."""
    what = "live head" if finished.is_live_head else "training"
    outcome = "promoted" if finished.promoted else "not promoted"
    return (
        f"{campaign}, seed {seed}: {what} after {finished.images} images took "
        f"{_duration(finished.seconds)}, {outcome}, AP50 {finished.map50:.2f} "
        f"({finished.map50_of_rest:.2f} on the images that are not labelled)"
    )


def describe_curves(campaigns: Sequence[Campaign]) -> list[str]:
    """Describes the AP50 on unlabelled images after each training, a line for each campaign."""
    return [
        f"{one.name}, seed {one.seed}: AP50 of the rest "
        + (
            ", ".join(f"{r.map50_of_rest:.2f} after {r.images}" for r in one.rounds)
            or "unknown, without a training"
        )
        for one in campaigns
    ]


def as_dict(
    plan: Plan, settings: Settings, data: LabelledData, campaigns: Sequence[Campaign]
) -> dict[str, Any]:
    """Makes the report as JSON values, with everything that is needed to run the plan again."""
    return {
        "plan": dataclasses.asdict(plan),
        "settings": {
            "preset": settings.preset,
            "weights": settings.weights,
            "costs": dataclasses.asdict(cost_model(settings)),
            **{
                name: getattr(settings, name)
                for name in sorted(Settings.model_fields)
                if name.startswith("train_") or name == "random_share"
            },
        },
        "images": len(data.samples),
        "boxes": sum(len(s.labels) for s in data.samples),
        "labels": list(data.labels),
        "left_out": data.left_out,
        "prices": list(plan.prices),
        "cores": usable_cores(),
        "campaigns": [
            {**dataclasses.asdict(c), "saving": {p: round(c.saving(p), 3) for p in plan.prices}}
            for c in campaigns
        ],
    }


def _duration(seconds: float) -> str:
    if seconds < 3600:
        return f"{seconds:.0f} s" if seconds < 60 else f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
