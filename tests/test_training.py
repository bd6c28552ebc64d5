"""Train detectors: they learn within the budget, and failures are handled."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ml_backend.demo.shapes import SHAPES, generate
from ml_backend.detection.architectures.fcos import fcos_shufflenet
from ml_backend.detection.architectures.torchvision import TorchvisionDetector
from ml_backend.detection.decoding import decode_image
from ml_backend.detection.detector import Detector
from ml_backend.detection.evaluation import evaluate
from ml_backend.detection.presets import Preset
from ml_backend.detection.presets.tiny import PRESET as TINY
from ml_backend.detection.training import (
    NothingToLearn,
    Progress,
    TrainingDiverged,
    TrainingResult,
    train,
)
from ml_backend.detection.types import Sample

CPU = torch.device("cpu")
LABELS = SHAPES[:3]
SMALL = replace(
    TINY,
    name="tests.test_training:SMALL",
    min_size=96,
    max_size=128,
    steps=250,
    epochs=1,
)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _samples(folder: Path, count: int, *, seed: int = 0) -> list[Sample]:
    samples = []
    for image in generate(count, seed=seed, width=128, height=96, most=2):
        path = folder / image.name
        path.write_bytes(image.encoded())
        labels = np.array([LABELS.index(name) for name in image.labels], np.int64)
        samples.append(Sample(image.name, path, image.boxes, labels))
    return samples


def _train(samples: Sequence[Sample], preset: Preset = SMALL, **options: Any) -> TrainingResult:
    return train(
        preset,
        LABELS,
        samples,
        **{"weights": "none", "device": CPU, "threads": 1, "budget_seconds": 300.0, **options},
    )


def _quality(detector: Detector, samples: Sequence[Sample]) -> float:
    found = detector.predict([decode_image(s.image) for s in samples])
    return evaluate(found, samples, LABELS).map50


def test_train_few_images_learns_them_within_its_steps(tmp_path: Path) -> None:
    samples = _samples(tmp_path, 12)
    told: list[Progress] = []
    result = _train(samples, on_progress=told.append)
    assert _quality(result.detector, samples) > 0.5
    assert _quality(Detector.pretrained(SMALL, LABELS, "none", CPU), samples) < 0.05
    assert result.stopped == "finished"
    assert result.steps == 250
    assert [p.fraction for p in told] == sorted(p.fraction for p in told)
    losses = [p.loss for p in told if not math.isnan(p.loss)]
    assert losses[-1] < 0.8 * losses[10]


def test_train_same_seed_gives_same_weights_and_other_seed_gives_others(tmp_path: Path) -> None:
    samples = _samples(tmp_path, 6)
    short = replace(SMALL, steps=6)
    first, again, other = (_train(samples, short, seed=seed).detector for seed in (1, 1, 2))
    states = [d.module.state_dict() for d in (first, again, other)]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert not all(torch.equal(states[0][k], states[2][k]) for k in states[0])


def test_train_two_threads_learns_as_one_thread_does(tmp_path: Path) -> None:
    samples = _samples(tmp_path, 12)
    result = _train(samples, threads=2)
    assert _quality(result.detector, samples) > 0.5


def test_train_budget_shorter_than_the_steps_ends_by_budget(tmp_path: Path) -> None:
    samples = _samples(tmp_path, 6)
    began = time.monotonic()
    result = _train(samples, replace(SMALL, steps=100_000), budget_seconds=4.0)
    assert time.monotonic() - began < 15
    assert result.stopped == "budget"


def test_train_step_share_takes_that_share_of_the_planned_steps(tmp_path: Path) -> None:
    result = _train(_samples(tmp_path, 3), replace(SMALL, steps=8), step_share=0.5)
    assert (result.steps, result.planned, result.stopped) == (4, 8, "finished")


def test_train_undecodable_images_are_left_out(tmp_path: Path) -> None:
    samples = _samples(tmp_path, 3)
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"<html>")
    bad = replace(samples[0], key="broken", image=broken)
    assert _train([bad, *samples], replace(SMALL, steps=2)).epochs == pytest.approx(16 / 3, abs=0.1)
    with pytest.raises(NothingToLearn, match="none of the 1 images"):
        _train([bad])


def test_train_images_up_to_max_pixels_are_learned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = _samples(tmp_path, 3)
    # Without the setting, the limit is 100 pixels here.
    monkeypatch.setattr(decode_image, "__kwdefaults__", {"max_pixels": 100})
    short = replace(SMALL, steps=2)
    assert _train(samples, short, max_pixels=128 * 96).steps == 2
    with pytest.raises(NothingToLearn):
        _train(samples, short, max_pixels=128 * 96 - 1)


def test_train_images_without_boxes_takes_its_steps(tmp_path: Path) -> None:
    samples = _samples(tmp_path, 3)
    empty = [replace(s, boxes=s.boxes[:0], labels=s.labels[:0]) for s in samples]
    assert _train(empty, replace(SMALL, steps=3)).steps == 3


class _Hungry(nn.Module):
    """Run out of memory on more than two images at a time, as a small GPU does."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.inner = fcos_shufflenet(outputs)

    def forward(self, images: list[torch.Tensor], targets: Any = None) -> Any:
        if self.training and len(images) > 2:
            raise torch.OutOfMemoryError("no more memory")
        return self.inner(images, targets)


def test_train_out_of_memory_halves_the_batch_and_goes_on(tmp_path: Path) -> None:
    hungry = replace(
        SMALL, name="tests.test_training:HUNGRY", architecture=TorchvisionDetector(_Hungry), steps=4
    )
    result = _train(_samples(tmp_path, 4), hungry)
    assert result.batch_size == 2
    assert result.steps == 4


class _Diverging(_Hungry):
    def forward(self, images: list[torch.Tensor], targets: Any = None) -> Any:
        losses = self.inner(images, targets)
        return {k: v * float("nan") for k, v in losses.items()} if self.training else losses


def test_train_loss_of_nan_raises_training_diverged(tmp_path: Path) -> None:
    diverging = replace(
        SMALL, name="tests.test_training:DIVERGING", architecture=TorchvisionDetector(_Diverging)
    )
    with pytest.raises(TrainingDiverged, match="a smaller learning rate"):
        _train(_samples(tmp_path, 2), diverging)


class _Enough(Exception):
    """Stop a training from outside."""


def test_train_on_progress_raises_stops_the_training(tmp_path: Path) -> None:
    def stop(progress: Progress) -> None:
        raise _Enough

    with pytest.raises(_Enough):
        _train(_samples(tmp_path, 2), on_progress=stop)


def test_train_start_with_one_label_less_learns_the_new_label(tmp_path: Path) -> None:
    samples = _samples(tmp_path, 12)
    # The first detector knows circles and squares; triangles are added.
    known = [
        replace(s, boxes=s.boxes[s.labels < 2], labels=s.labels[s.labels < 2]) for s in samples
    ]
    before = train(
        replace(SMALL, steps=150),
        LABELS[:2],
        known,
        weights="none",
        device=CPU,
        threads=1,
        budget_seconds=300,
    ).detector
    after = _train(samples, start=before).detector
    assert after.labels == LABELS
    assert _quality(after, samples) > 0.5
