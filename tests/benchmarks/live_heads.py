"""Measure live heads: AP50 on images not annotated, and the seconds of each fit.

    python -m tests.benchmarks.live_heads DATASET

DATASET is COCO, Pascal VOC, YOLO or an export of Label Studio. Images are annotated in a seeded
order, one after the other, as in a project; at the given sizes, the head is measured on the images
with odd numbers that are not annotated. Those with even numbers chose its constants.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console

from ml_backend.datasets.reader import read_dataset
from ml_backend.detection.costs import NEVER, CostModel, by_hand, human_seconds, shown
from ml_backend.detection.evaluation import evaluate
from ml_backend.detection.prediction import predict_samples
from ml_backend.detection.types import Sample
from ml_backend.settings import load_settings
from ml_backend.training.dataset import Dataset
from ml_backend.training.live_head import LiveHead
from ml_backend.training.outcome import TrainingOutcome, cost_model

_err = Console(stderr=True)


def main(
    dataset: Annotated[Path, typer.Argument(help="Folder of a labelled data set.")],
    sizes: Annotated[str, typer.Option(help="Numbers of images to measure at.")] = "3,5,10,20,60",
    seeds: Annotated[str, typer.Option(help="Seeds of the order.")] = "0,1,2",
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
) -> None:
    """Fit heads to growing numbers of images; answer JSON."""
    torch.set_num_threads(threads)
    data = read_dataset(dataset, _err.print)
    judges = [s for number, s in enumerate(data.samples) if number % 2]
    rows: list[dict[str, Any]] = []
    seconds: list[float] = []
    for seed in map(int, seeds.split(",")):
        order = list(judges)
        random.Random(seed).shuffle(order)
        wanted = sorted(map(int, sizes.split(",")))
        held = order[wanted[-1] :]
        with tempfile.TemporaryDirectory() as folder:
            settings = load_settings(
                {"MODEL_DIR": folder, "ML_BACKEND_TRAIN_THREADS": str(threads)}
            )
            head = LiveHead(settings, torch.device("cpu"), lambda *_: None, Path(folder) / "f")
            for size in range(1, wanted[-1] + 1):
                began = time.monotonic()
                # Features of one image are new each time, as in a project.
                outcome = head.fit(_dataset(data.labels, order[:size]), None) if size > 1 else None
                if size >= settings.live_min:
                    seconds.append(time.monotonic() - began)
                if size in wanted and outcome is not None:
                    row = _row(seed, size, seconds[-1], outcome, held, cost_model(settings))
                    _err.print(row)
                    rows.append(row)
    means = {
        size: round(float(np.mean([r["map50"] for r in rows if r["images"] == size])), 3)
        for size in {row["images"] for row in rows}
    }
    p95 = round(float(np.quantile(seconds, 0.95)), 2)
    print(json.dumps({"rows": rows, "mean_ap50": means, "fit_p95_seconds": p95}))


def _dataset(labels: tuple[str, ...], samples: list[Sample]) -> Dataset:
    numbers = {sample.key: number for number, sample in enumerate(samples)}
    return Dataset(labels, tuple(samples), numbers, numbers, frozenset(), len(samples))


def _row(
    seed: int,
    size: int,
    seconds: float,
    outcome: TrainingOutcome,
    held: list[Sample],
    costs: CostModel,
) -> dict[str, Any]:
    detector = outcome.detector
    found = predict_samples(detector, held, max_pixels=100_000_000)
    quality = evaluate([found[s.key] for s in held], held, detector.labels)
    limits = np.array([detector.thresholds.get(label, NEVER) for label in detector.labels])
    human = sum(
        human_seconds(shown(found[s.key], limits[found[s.key].labels]), s, costs) for s in held
    )
    return {
        "seed": seed,
        "images": size,
        "seconds": round(seconds, 2),
        "estimate": round(outcome.assessment.evaluation.map50, 3),
        "map50": round(quality.map50, 3),
        "times_less_work": round(sum(by_hand(s, costs) for s in held) / human, 2),
        "withheld": [label for label, t in detector.thresholds.items() if t >= NEVER],
    }


if __name__ == "__main__":
    typer.run(main)
