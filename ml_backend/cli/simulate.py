"""`simulate`: campaigns on labelled images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich.markup import escape
from rich.progress import Progress

from ml_backend.cli.opening import check_device as _checked_device
from ml_backend.cli.opening import open_settings as _settings
from ml_backend.cli.options import JsonOption as _Json
from ml_backend.cli.output import err as _err
from ml_backend.cli.output import fail as _fail
from ml_backend.cli.output import out as _out
from ml_backend.cli.output import print_json as _print_json
from ml_backend.cli.output import say_wrong as _say_wrong

_Number = TypeVar("_Number", int, float)


def simulate(
    dataset: Annotated[
        Path, typer.Argument(help="Labelled images: COCO, Pascal VOC, YOLO, or an export.")
    ],
    strategies: Annotated[
        str, typer.Option(help="What is asked next: diverse, uncertainty, random.")
    ] = "diverse,random",
    seeds: Annotated[str, typer.Option(help="One campaign of each strategy for each.")] = "0",
    prices: Annotated[str, typer.Option(help="Seconds that drawing a box takes.")] = "7,27.6",
    story: Annotated[
        bool, typer.Option(help="Also one round after the first 55 images, as in the story.")
    ] = True,
    stop_after: Annotated[int | None, typer.Option(help="Images to label; all by default.")] = None,
    picture: Annotated[Path, typer.Option(help="Receives the curves.")] = Path("simulation.png"),
    as_json: _Json = False,
) -> None:
    """Run whole campaigns on labelled images, and count what people would have saved.

    The settings are those of a live project: ML_BACKEND_PRESET, _WEIGHTS, _TRAIN_EVERY,
    _TRAIN_GROWTH, _TRAIN_BUDGET and the rest. Trainings take all cores unless
    ML_BACKEND_TRAIN_THREADS says otherwise.
    """
    settings = _settings()
    _checked_device(settings)
    from ml_backend.datasets.datasets import DatasetError, read_dataset
    from ml_backend.simulation.chart import check_picture, draw_campaigns
    from ml_backend.simulation.report import (
        Plan,
        as_dict,
        curves,
        run,
        summary_table,
        usable,
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
        _say_wrong("option", error)
        raise typer.Exit(2) from None
    campaigns = []
    interrupted = False
    try:
        data = read_dataset(dataset)
        with Progress(console=_err) as progress:
            bar = progress.add_task("", total=1.0)

            def tell(fraction: float, words: str) -> None:
                progress.update(bar, completed=fraction, description=escape(words))

            data = usable(data, settings, tell)
            for campaign in run(plan, settings, data, tell):
                campaigns.append(campaign)
    except DatasetError as error:
        raise _fail(str(error)) from None
    except KeyboardInterrupt:
        interrupted = True
        _err.print(f"interrupted: {len(campaigns)} campaigns are done", highlight=False)
        if not campaigns:
            raise typer.Exit(130) from None
    if as_json:
        _print_json(as_dict(plan, settings, data, campaigns))
    else:
        for reason, count in data.left_out.items():
            _err.print(f"left out: {count} × {escape(reason)}", soft_wrap=True, highlight=False)
        _out.print(summary_table(plan, campaigns))
        for line in curves(campaigns):
            _out.print(escape(line), soft_wrap=True, highlight=False)
    try:
        draw_campaigns(campaigns, f"{dataset.name}: {len(data.samples)} images", picture)
    except OSError as error:
        raise _fail(f"the picture {picture} cannot be written: {error}") from None
    if not as_json:
        _out.print(f"The curves are in {escape(str(picture))}.", soft_wrap=True)
    if interrupted:
        raise typer.Exit(130)


def _numbers(option: str, text: str, kind: type[_Number]) -> tuple[_Number, ...]:
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{option}: {text!r} must be numbers with commas between them") from None
