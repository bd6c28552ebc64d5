"""Draws the curves of simulated campaigns. The only module that imports matplotlib."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from ml_backend.simulation.results import Campaign


def check_picture(file: Path) -> None:
    """Checks that a picture can be written to a file, before there is a picture.

    Raises:
        ValueError: the file has no ending of a picture, or its folder cannot be written.
    """
    kinds = Figure().canvas.get_supported_filetypes()
    if file.suffix[1:].lower() not in kinds:
        raise ValueError(f"picture: {file} must end in one of {', '.join(sorted(kinds))}")
    if not (file.parent.is_dir() and os.access(file.parent, os.W_OK)) or file.is_dir():
        raise ValueError(f"picture: {file} cannot be written: name a file in a folder of yours")


def draw_campaigns(campaigns: Sequence[Campaign], title: str, file: Path) -> None:
    """Draws hours of work over images for each price of a box, and AP50 on unlabelled images.

    Args:
        campaigns: at least one; campaigns of one name get one colour.
        title: title of the picture.
        file: receives the picture; its ending names the format (PNG, SVG, PDF).

    Raises:
        OSError: the file cannot be written.
        ValueError: the file has no ending of a picture.
    """
    prices = list(campaigns[0].human)
    names = list(dict.fromkeys(c.name for c in campaigns))
    colour = {name: f"C{i}" for i, name in enumerate(names)}
    figure = Figure(figsize=(5 * (len(prices) + 1), 4.5), layout="constrained")
    axes = figure.subplots(1, len(prices) + 1)
    for price, axis in zip(prices, axes, strict=False):
        hand = campaigns[0].by_hand[price]
        axis.plot(range(1, len(hand) + 1), [s / 3600 for s in hand], "k--", label="by hand")
        for name, campaign in _named(campaigns):
            hours = [s / 3600 for s in campaign.human[price]]
            axis.plot(range(1, len(hours) + 1), hours, colour[campaign.name], label=name)
        axis.set(xlabel="images labelled", ylabel="hours of people's work")
        axis.set_title(f"{price:g} s to draw a box")
        axis.legend()
    for name, campaign in _named(campaigns):
        axes[-1].plot(
            [r.images for r in campaign.rounds],
            [r.map50_of_rest for r in campaign.rounds],
            f"{colour[campaign.name]}o-",
            label=name,
        )
    axes[-1].set(xlabel="images labelled", ylabel="AP50 on unlabelled images", ylim=(0, 1))
    axes[-1].set_title("live version")
    axes[-1].legend()
    figure.suptitle(title)
    figure.savefig(file, dpi=120)


def _named(campaigns: Sequence[Campaign]) -> list[tuple[str | None, Campaign]]:
    """Pairs each campaign with its name, once for each name: one entry in the legend."""
    seen: set[str] = set()
    named: list[tuple[str | None, Campaign]] = []
    for campaign in campaigns:
        named.append((None if campaign.name in seen else campaign.name, campaign))
        seen.add(campaign.name)
    return named
