"""Measure how a label that is added half-way changes the AP50 of the others.

    python -m tests.benchmarks.late DATASET --label Platelets

Simulates two campaigns over the same images: in one, the annotator draws the label's boxes once
half of the images are labelled, and does not go back to the earlier ones; in the other, the label
does not exist. Both are measured on the images that were never labelled. The settings are those of
a live project, as for `ml-backend simulate`. To compare two commits, run each commit's own copy.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from ml_backend.datasets.reader import read_dataset
from ml_backend.detection.device import resolve_device
from ml_backend.detection.types import Sample
from ml_backend.reasons import Reason
from ml_backend.settings import load_settings
from ml_backend.simulation.campaign import Simulation
from ml_backend.simulation.results import Round
from ml_backend.wording import words

_err = Console(stderr=True)


def main(
    dataset: Annotated[Path, typer.Argument(help="Labelled images.")],
    label: Annotated[str, typer.Option(help="The label that comes late.")],
    images: Annotated[int, typer.Option(help="Images labelled in all.")] = 158,
    seed: Annotated[int, typer.Option(help="Of the order.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Answer as JSON.")] = False,
) -> None:
    """Run both campaigns, and compare the other labels at the end."""
    data = read_dataset(dataset)
    settings = load_settings()
    if settings.train_threads is None:
        settings = settings.model_copy(update={"train_threads": os.cpu_count()})
    others = tuple(name for name in data.labels if name != label)
    last: dict[str, Round] = {}
    newest: dict[str, str] = {}
    for name, labels, samples, late in (
        ("added half-way", data.labels, list(data.samples), {label: images // 2}),
        ("never there", others, [_without(s, data.labels, others) for s in data.samples], {}),
    ):
        simulation = Simulation(
            settings, resolve_device(settings.device), labels, samples, (7.0,), _tell
        )
        campaign = simulation.loop("random", seed, stop_after=images, late=late)
        last[name] = next(r for r in reversed(campaign.rounds) if r.promoted)
        finished = campaign.rounds[-1]
        newest[name] = f"{finished.images} images: {words(finished.reason)}"
    if as_json:
        print(
            json.dumps(
                {
                    name: {"images": r.images, "ap50": r.ap50_of_rest, "newest": newest[name]}
                    for name, r in last.items()
                }
            )
        )
        return
    table = Table("", "live, trained on", *data.labels)
    for name, one in last.items():
        table.add_row(
            name,
            f"{one.images} images",
            *(_shown(one.ap50_of_rest.get(known)) for known in data.labels),
        )
    Console().print(table)
    for name, verdict in newest.items():
        Console().print(f"{name}, {verdict}", soft_wrap=True, highlight=False)
    with_it, without = (one.ap50_of_rest for one in last.values())
    change = np.mean([(with_it[other] or 0.0) - (without[other] or 0.0) for other in others])
    Console().print(f"the others change by {100 * change:+.1f} points of AP50 on average")


def _without(sample: Sample, labels: tuple[str, ...], others: tuple[str, ...]) -> Sample:
    keep = np.array([labels[i] in others for i in sample.labels.tolist()], bool)
    kept = [others.index(labels[i]) for i in sample.labels[keep].tolist()]
    return replace(sample, boxes=sample.boxes[keep], labels=np.array(kept, np.int64))


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _tell(fraction: float, why: Reason) -> None:
    _err.print(f"{fraction:.0%} {words(why)}", end="\r", highlight=False)


if __name__ == "__main__":
    typer.run(main)
