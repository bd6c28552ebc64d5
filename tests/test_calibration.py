"""Confidences that mean what they say."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from ml_backend.detection.calibration import Curve, calibrate, calibration_from, fit_calibration
from ml_backend.detection.evaluation import evaluate
from ml_backend.detection.types import Detections, Sample

LABELS = ("sure", "modest", "unseen")


def _biased(seed: int, images: int) -> tuple[list[Detections], list[Sample]]:
    """Detections of `sure` are right in half as many cases as they say, of `modest` in all."""
    random = np.random.default_rng(seed)
    found, truth = [], []
    for number in range(images):
        scores = np.sort(random.uniform(0.05, 0.95, 12))[::-1]
        corner = np.stack([np.arange(12) * 50.0, np.zeros(12)], 1)
        boxes = np.concatenate([corner, corner + 40], 1).astype(np.float32)
        labels = random.integers(0, 2, 12)
        right = random.random(12) < np.where(labels == 0, scores / 2, 0.5 + scores / 2)
        found.append(Detections(boxes, scores.astype(np.float32), labels, size=(700, 400)))
        truth.append(Sample(str(number), Path("x"), boxes[right], labels[right]))
    return found, truth


def _gap(found: list[Detections], truth: list[Sample], label: int) -> float:
    """Expected calibration error, over ten bins (Naeini et al., 2015)."""
    scores = np.concatenate([f.scores[f.labels == label] for f in found])
    right = np.concatenate(
        [
            [(s.boxes == box).all(1).any() for box in f.boxes[f.labels == label]]
            for f, s in zip(found, truth, strict=True)
        ]
    ).astype(float)
    bins = (scores * 10).astype(int)
    return float(
        sum(
            abs(scores[bins == b].mean() - right[bins == b].mean()) * (bins == b).mean()
            for b in np.unique(bins)
        )
    )


def _calibrated(found: list[Detections], curves: dict[str, Curve]) -> list[Detections]:
    return [calibrate(f, LABELS, curves) for f in found]


def test_calibrate_confidence_is_the_share_of_right_boxes() -> None:
    learned, known = _biased(0, 60)
    curves = fit_calibration(learned, known, LABELS)
    found, truth = _biased(1, 200)
    after = _calibrated(found, curves)
    for label in (0, 1):
        assert _gap(found, truth, label) > 0.15
        assert _gap(after, truth, label) < 0.05


@pytest.mark.parametrize("left_out", ["cut off", "small"])
def test_calibrate_boxes_that_people_leave_out_rank_lower(left_out: str) -> None:
    def images(seed: int, count: int) -> tuple[list[Detections], list[Sample]]:
        random = np.random.default_rng(seed)
        found, truth = [], []
        for number in range(count):
            corner = np.stack([30 + np.arange(10) * 50.0, random.uniform(20, 40, 10)], 1)
            boxes = np.concatenate([corner, corner + random.uniform(30, 44, (10, 1))], 1)
            out = random.random(10) < 0.4
            if left_out == "cut off":
                boxes[out, 1] = 0.0
            else:
                boxes[out, 2:] = boxes[out, :2] + 15
            right = ~out & (random.random(10) < 0.95)
            scores = np.sort(random.uniform(0.4, 0.9, 10))[::-1].astype(np.float32)
            boxes = boxes.astype(np.float32)
            labels = np.zeros(10, np.int64)
            found.append(Detections(boxes, scores, labels, size=(600, 400)))
            truth.append(Sample(str(number), Path("x"), boxes[right], labels[right]))
        return found, truth

    curves = fit_calibration(*images(0, 20), LABELS)
    found, truth = images(1, 50)
    assert evaluate(found, truth, LABELS).map50 < 0.75
    after = _calibrated(found, curves)
    assert evaluate(after, truth, LABELS).map50 > 0.9
    # Through a file it stays the same.
    saved = json.loads(json.dumps({name: asdict(curve) for name, curve in curves.items()}))
    assert calibration_from(saved) == curves


def test_fit_calibration_few_boxes_change_little() -> None:
    box = np.array([[100, 100, 140, 140]], np.float32)
    one = Detections(box, np.array([0.9], np.float32), np.array([0]), size=(600, 400))
    empty = Sample("1", Path("x"), box[:0], np.zeros(0, np.int64))
    curves = fit_calibration([one], [empty], LABELS)
    assert set(curves) == {"sure"}
    (score,) = calibrate(one, LABELS, curves).scores
    assert 0.7 < score < 0.9
    assert calibrate(one, LABELS, {}) is one
