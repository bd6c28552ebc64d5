"""Measure how good a detector gets, and how long it takes, over the number of annotated images.

    python -m tests.benchmarks.learn DATASET --weights FILE

DATASET is COCO, Pascal VOC, YOLO or an export of Label Studio. For each size the first images of
one seeded order are learned from; all images after the first 55 measure, or after the size where
that is more, so that the smaller sizes are measured on the same images.

To compare two commits, run each commit's own copy with the same `--threads` (a copy without this
option uses all cores) and with a `--budget` that no training reaches: how many steps a training
takes before its budget ends it depends on the load of the machine.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress as Bar
from rich.table import Table

from ml_backend.datasets.reader import read_dataset
from ml_backend.detection.detector import Detector
from ml_backend.detection.evaluation import bootstrap_interval, evaluate
from ml_backend.detection.prediction import predict_samples
from ml_backend.detection.presets import preset_named
from ml_backend.detection.training import Progress, TrainingResult, train
from ml_backend.detection.types import Sample
from ml_backend.machine import usable_cores

_SMALLEST_TEST = 55
_err = Console(stderr=True)


def main(
    dataset: Annotated[Path, typer.Argument(help="Folder of a labelled data set.")],
    weights: Annotated[str, typer.Option(help="As ML_BACKEND_WEIGHTS.")] = "auto",
    preset: Annotated[str, typer.Option(help="As ML_BACKEND_PRESET.")] = "tiny",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    sizes: Annotated[str, typer.Option(help="Numbers of images.")] = "10,25,55,110,219",
    budget: Annotated[float, typer.Option(help="Seconds that each training may take.")] = 360.0,
    seed: Annotated[int, typer.Option(help="Of the order, and of the trainings.")] = 0,
    threads: Annotated[int, typer.Option(help="Of a training; 0 for all cores.")] = 0,
    warm: Annotated[
        bool, typer.Option(help="Also start each size from the detector of the one before.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Answer as JSON.")] = False,
) -> None:
    """Train on some images, measure on the others."""
    data = read_dataset(dataset, _err.print)
    labels, samples = data.labels, data.samples
    order = list(range(len(samples)))
    random.Random(seed).shuffle(order)
    shuffled = [samples[i] for i in order]
    rows: list[dict[str, Any]] = []
    before: Detector | None = None
    for size in map(int, sizes.split(",")):
        learned, held = shuffled[:size], shuffled[max(size, _SMALLEST_TEST) :]
        starts: list[tuple[str, Detector | None]] = [("preset's weights", None)]
        if warm and before is not None:
            starts.append(("the detector before", before))
        for name, start in starts:
            result = _train(
                preset,
                labels,
                learned,
                start,
                weights,
                torch.device(device),
                seed,
                budget,
                threads or usable_cores(),
            )
            rows.append(_row(size, name, result, held, labels))
            _err.print(rows[-1])
            if start is None:
                newest = result.detector
        before = newest
    if as_json:
        print(json.dumps({"cores": usable_cores(), "torch": torch.__version__, "rows": rows}))
        return
    table = Table("images", "start", "tested on", "AP50", "90 % interval", *labels, "AP", "seconds")
    for row in rows:
        low, high = row["interval"]
        table.add_row(
            *(str(row["images"]), row["start"], str(row["tested"])),
            *(f"{row['map50']:.3f}", f"{low:.3f} to {high:.3f}"),
            *(f"{row['ap50'][label]:.3f}" for label in labels),
            *(f"{row['map']:.3f}", f"{row['seconds']:.0f}"),
        )
    Console().print(table)


def _train(
    preset: str,
    labels: tuple[str, ...],
    samples: list[Sample],
    start: Detector | None,
    weights: str,
    device: torch.device,
    seed: int,
    budget: float,
    threads: int,
) -> TrainingResult:
    with Bar(console=_err, transient=True) as bar:
        task = bar.add_task(f"{len(samples)} images", total=1.0)

        def tell(progress: Progress) -> None:
            bar.update(task, completed=progress.fraction)

        return train(
            preset_named(preset, device),
            labels,
            samples,
            # Training changes its start.
            start=start.with_labels(labels) if start else None,
            weights=weights,
            device=device,
            seed=seed,
            budget_seconds=budget,
            threads=threads,
            on_progress=tell,
        )


def _row(
    size: int, start: str, result: TrainingResult, held: list[Sample], labels: tuple[str, ...]
) -> dict[str, Any]:
    found = predict_samples(result.detector, held, max_pixels=100_000_000)
    predictions = [found[sample.key] for sample in held]
    quality = evaluate(predictions, held, labels)
    interval = bootstrap_interval(predictions, held, labels, seed=0)
    return {
        "images": size,
        "start": start,
        "tested": len(held),
        "map50": round(quality.map50, 4),
        "map": round(quality.map, 4),
        "interval": [round(interval.low, 4), round(interval.high, 4)],
        "ap50": {label: round(one.ap50 or 0.0, 4) for label, one in quality.per_class.items()},
        "seconds": round(result.seconds, 1),
        "steps": result.steps,
        "stopped": result.stopped,
    }


if __name__ == "__main__":
    typer.run(main)
