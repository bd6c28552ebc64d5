"""Measure how often the gate is wrong: its estimates and verdicts, against the truth.

    python -m tests.benchmarks.gate DATASET

DATASET is COCO, Pascal VOC, YOLO or an export of Label Studio. A campaign labels images in a seeded
random order and trains at the given sizes, as a live project does. At every decision the new
version and the live one are measured on images that are not labelled: that is the truth. With
`--spoilt`, each decision is made again for versions that were spoilt on purpose: a third of the new
labels swapped, the new boxes shifted, and a learning rate a hundred times too high.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console

from ml_backend.datasets.reader import read_dataset
from ml_backend.detection.decoding import decode_image
from ml_backend.detection.detector import Detector
from ml_backend.detection.evaluation import evaluate
from ml_backend.detection.prediction import predict_samples
from ml_backend.detection.presets import Preset, preset_named
from ml_backend.detection.types import Sample
from ml_backend.settings import Settings, load_settings
from ml_backend.training.dataset import Dataset
from ml_backend.training.live_head import LiveHead
from ml_backend.training.outcome import Live, TrainingOutcome
from ml_backend.training.split import Item, assign, fingerprint
from ml_backend.training.trainer import Trainer
from ml_backend.wording import words

_CPU = torch.device("cpu")
_err = Console(stderr=True)


def main(
    dataset: Annotated[Path, typer.Argument(help="Folder of a labelled data set.")],
    sizes: Annotated[str, typer.Option(help="Images at each training.")] = "10,20,40,80,160",
    seeds: Annotated[str, typer.Option(help="Seeds of the order.")] = "0,1,2",
    preset: Annotated[str, typer.Option(help="As ML_BACKEND_PRESET.")] = "lite",
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    judges: Annotated[int, typer.Option(help="Images that measure the truth, at most.")] = 100,
    spoilt: Annotated[bool, typer.Option(help="Also judge versions spoilt on purpose.")] = False,
) -> None:
    """Run campaigns; answer every decision, and what is wrong in the mean, as JSON."""
    torch.set_num_threads(threads)
    settings = load_settings(
        {"ML_BACKEND_PRESET": preset, "ML_BACKEND_TRAIN_THREADS": str(threads)}
    )
    data = read_dataset(dataset, _err.print)
    decisions: list[dict[str, Any]] = []
    for seed in map(int, seeds.split(",")):
        order = list(data.samples)
        random.Random(seed).shuffle(order)
        campaign = _Campaign(settings, data.labels, order, judges)
        for size in map(int, sizes.split(",")):
            for decision in campaign.decide(size, spoilt=spoilt):
                decisions.append({"seed": seed, **decision})
                _err.print(decisions[-1])
    print(json.dumps({"summary": _summary(decisions), "decisions": decisions}))


class _Campaign:
    """One campaign: what is labelled, and what is live."""

    def __init__(
        self, settings: Settings, labels: tuple[str, ...], order: list[Sample], judges: int
    ) -> None:
        self._settings = settings
        self._labels = labels
        self._order = order
        self._judges = judges
        self._items: dict[str, Item] = {}
        self._live: Live | None = None
        self._best = 0.0
        self._before = 0

    def decide(self, size: int, *, spoilt: bool) -> Iterator[dict[str, Any]]:
        """Makes the decisions of a training at a number of images."""
        dataset = self._dataset(size)
        held = self._order[size:][: self._judges]
        if self._live is None:
            head = LiveHead(self._settings, _CPU, lambda *_: None).fit(dataset, None)
            self._live = Live("head", head.detector, head.out_of_fold)
        live_truth = self._truth(self._live.detector, held)
        if spoilt:
            for name, (preset, bad) in self._spoilt(dataset).items():
                trainer = Trainer(self._settings, _CPU, lambda *_: None)
                trainer.preset = preset
                outcome = trainer.fit(bad, self._live)
                yield self._decision(name, size, outcome, held, live_truth)
        outcome = Trainer(self._settings, _CPU, lambda *_: None).fit(dataset, self._live)
        decision = self._decision("sound", size, outcome, held, live_truth)
        if outcome.verdict.promote:
            self._live = Live(f"v{size}", outcome.detector, outcome.out_of_fold)
        live_now = decision["truth"] if outcome.verdict.promote else live_truth
        self._best = max(self._best, decision["truth"], live_truth)
        self._before = size
        yield {**decision, "regret": round(self._best - live_now, 4)}

    def _decision(
        self, name: str, size: int, outcome: TrainingOutcome, held: list[Sample], live: float
    ) -> dict[str, Any]:
        truth = self._truth(outcome.detector, held)
        return {
            "version": name,
            "images": size,
            "estimate": round(outcome.assessment.evaluation.map50, 4),
            "truth": round(truth, 4),
            "live_truth": round(live, 4),
            "delta": round(outcome.comparison.delta, 4) if outcome.comparison else None,
            "promoted": outcome.verdict.promote,
            "reason": words(outcome.verdict.reason),
            "seconds": round(outcome.result.seconds, 1),
        }

    def _truth(self, detector: Detector, held: list[Sample]) -> float:
        found = predict_samples(detector, held, max_pixels=100_000_000)
        return evaluate([found[s.key] for s in held], held, self._labels).map50

    def _dataset(self, size: int) -> Dataset:
        samples = self._order[:size]
        for number, sample in enumerate(samples):
            if sample.key not in self._items:
                mark = fingerprint(decode_image(sample.image, max_pixels=100_000_000))
                names = frozenset(self._labels[i] for i in sample.labels.tolist())
                self._items[sample.key] = Item(number, sample.image.name, mark, names, True)
        assign(list(self._items.values()))
        return Dataset(
            labels=self._labels,
            samples=tuple(samples),
            task_of={s.key: self._items[s.key].task for s in samples},
            clip_of={s.key: self._items[s.key].clip or 0 for s in samples},
            holdout=frozenset(s.key for s in samples if self._items[s.key].side == "holdout"),
            revision=size,
        )

    def _spoilt(self, dataset: Dataset) -> dict[str, tuple[Preset, Dataset]]:
        preset = preset_named(self._settings.preset, _CPU)
        new = {s.key for s in dataset.samples[self._before :]}
        random = np.random.default_rng(len(dataset.samples))

        def swapped(sample: Sample) -> Sample:
            if sample.key not in new:
                return sample
            wrong = random.random(len(sample.labels)) < 1 / 3
            return dataclasses.replace(
                sample,
                labels=np.where(wrong, (sample.labels + 1) % len(self._labels), sample.labels),
            )

        def shifted(sample: Sample) -> Sample:
            if sample.key not in new:
                return sample
            sides = sample.boxes[:, 2:] - sample.boxes[:, :2]
            return dataclasses.replace(
                sample, boxes=(sample.boxes + 0.6 * np.tile(sides, 2)).astype(np.float32)
            )

        def changed(change: Any) -> Dataset:
            return dataclasses.replace(
                dataset, samples=tuple(change(sample) for sample in dataset.samples)
            )

        broken = dataclasses.replace(preset, learning_rate=100 * preset.learning_rate)
        found = {"boxes shifted": (preset, changed(shifted)), "learning rate": (broken, dataset)}
        if len(self._labels) > 1:
            found["labels swapped"] = (preset, changed(swapped))
        return found


def _summary(decisions: list[dict[str, Any]]) -> dict[str, Any]:
    sound = [d for d in decisions if d["version"] == "sound"]
    bad = [d for d in decisions if d["version"] != "sound"]
    gains = [(d["truth"] - d["live_truth"], d["promoted"]) for d in sound]
    return {
        "decisions": len(sound),
        "mean_bias": round(float(np.mean([d["estimate"] - d["truth"] for d in sound])), 4),
        "mean_regret": round(float(np.mean([d["regret"] for d in sound])), 4),
        "refused_though_3_points_better": sum(g >= 0.03 and not p for g, p in gains),
        "promoted_though_3_points_worse": sum(g <= -0.03 and p for g, p in gains),
        "spoilt_refused": f"{sum(not d['promoted'] for d in bad)} of {len(bad)}",
    }


if __name__ == "__main__":
    typer.run(main)
