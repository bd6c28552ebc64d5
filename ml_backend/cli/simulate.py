"""`simulate`: runs campaigns on labelled images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.markup import escape

from ml_backend.cli.opening import check_device, open_settings
from ml_backend.cli.options import JsonOption
from ml_backend.cli.output import err, fail, out, print_json, say_wrong
from ml_backend.cli.progress import ProgressReporter
from ml_backend.reasons import Reason
from ml_backend.wording import told, words

if TYPE_CHECKING:
    from ml_backend.simulation.results import Round

_Number = TypeVar("_Number", int, float)


def simulate(
    dataset: Annotated[
        Path, typer.Argument(help="Labelled images: COCO, Pascal VOC, YOLO, or an export.")
    ],
    strategies: Annotated[
        str,
        typer.Option(help="Names of strategies, as in ML_BACKEND_STRATEGY, commas between them."),
    ] = "diverse,random",
    seeds: Annotated[str, typer.Option(help="One campaign of each strategy for each.")] = "0",
    prices: Annotated[str, typer.Option(help="Seconds that drawing a box takes.")] = "7,27.6",
    story: Annotated[
        bool, typer.Option(help="Also one round after the first 55 images, as in the story.")
    ] = True,
    stop_after: Annotated[int | None, typer.Option(help="Images to label; all by default.")] = None,
    picture: Annotated[Path, typer.Option(help="Receives the curves.")] = Path("simulation.png"),
    as_json: JsonOption = False,
) -> None:
    """Run whole campaigns on labelled images, and count what people would have saved.

    The settings are those of a live project: ML_BACKEND_PRESET, _WEIGHTS, _TRAIN_EVERY,
    _TRAIN_GROWTH, _TRAIN_BUDGET and the rest. Trainings take all cores unless
    ML_BACKEND_TRAIN_THREADS says otherwise.
    """
    settings = open_settings()
    check_device(settings)
    from ml_backend.datasets.reader import read_dataset
    from ml_backend.datasets.types import DatasetError
    from ml_backend.simulation.chart import check_picture, draw_campaigns
    from ml_backend.simulation.report import (
        Plan,
        as_dict,
        describe_curves,
        describe_round,
        keep_decodable,
        run,
        summary_table,
    )

    try:
        plan = Plan(
            strategies=tuple(strategies.split(",")),
            seeds=_numbers("seeds", seeds, int),
            prices=_numbers("prices", prices, float),
            story=story,
            stop_after=stop_after,
        )
        check_picture(picture)
    except ValueError as error:
        say_wrong("option", error)
        raise typer.Exit(2) from None
    campaigns = []
    interrupted = False
    try:
        data = read_dataset(dataset)
        with ProgressReporter(err) as progress:

            def on_round(campaign: str, seed: int, finished: Round) -> None:
                progress.milestone(describe_round(campaign, seed, finished))

            def on_progress(fraction: float, stage: Reason) -> None:
                progress.update(fraction, words(stage))

            data = keep_decodable(data, settings, on_progress)
            for campaign in run(plan, settings, data, on_progress, on_round):
                campaigns.append(campaign)
    except DatasetError as error:
        raise fail(str(error)) from None
    except KeyboardInterrupt:
        interrupted = True
        err.print(f"interrupted: {len(campaigns)} campaigns are done", highlight=False)
        if not campaigns:
            raise typer.Exit(130) from None
    if as_json:
        print_json(_with_words(as_dict(plan, settings, data, campaigns)))
    else:
        for reason, count in data.left_out.items():
            err.print(f"left out: {count} × {escape(reason)}", soft_wrap=True, highlight=False)
        out.print(summary_table(plan, campaigns))
        for line in describe_curves(campaigns):
            out.print(escape(line), soft_wrap=True, highlight=False)
    try:
        draw_campaigns(campaigns, f"{dataset.name}: {len(data.samples)} images", picture)
    except OSError as error:
        raise fail(f"the picture {picture} cannot be written: {error}") from None
    if not as_json:
        out.print(f"The curves are in {escape(str(picture))}.", soft_wrap=True)
    if interrupted:
        raise typer.Exit(130)


def _with_words(report: dict[str, Any]) -> dict[str, Any]:
    """Adds words to the reasons of a report's rounds."""
    for campaign in report["campaigns"]:
        for finished in campaign["rounds"]:
            finished |= told("reason", Reason.of(finished["reason"]))
    return report


def _numbers(option: str, text: str, kind: type[_Number]) -> tuple[_Number, ...]:
    """Reads an option of numbers with commas between them.

    Raises:
        ValueError: the text is something else; the message names the option.
    """
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{option}: {text!r} must be numbers with commas between them") from None
