"""What people's work costs, against a person who tries everything; thresholds, against a search."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from ml_backend.detection.costs import (
    BELIEF,
    FEW_BOXES,
    NEVER,
    CostModel,
    by_hand,
    cheapest_thresholds,
    human_seconds,
    shown,
)
from ml_backend.detection.types import Detections, Sample
from tests.scenes import LABELS, scene

COSTS = CostModel(look=3.3, draw=7.0, correct=4.0, delete=1.5, relabel=2.0)
SLOW = CostModel(look=3.3, draw=27.6, correct=4.0, delete=1.5, relabel=2.0)


def _drawn(*boxes: tuple[float, float, float, float], labels: list[int]) -> Detections:
    return Detections(
        np.array(boxes, np.float32).reshape(-1, 4),
        np.linspace(0.9, 0.5, len(boxes), dtype=np.float32),
        np.array(labels, np.int64),
    )


def _truth(*boxes: tuple[float, float, float, float], labels: list[int]) -> Sample:
    drawn = _drawn(*boxes, labels=labels)
    return Sample("1", Path("x"), drawn.boxes, drawn.labels)


SQUARE = (0.0, 0.0, 100.0, 100.0)
NEAR = (0.0, 0.0, 100.0, 60.0)
"""Overlaps with the square by 0.6."""
ELSEWHERE = (300.0, 300.0, 350.0, 350.0)


@pytest.mark.parametrize(
    ("drawn", "seconds"),
    [
        (_drawn(labels=[]), 7.0),
        (_drawn(SQUARE, labels=[0]), 0.0),
        (_drawn(NEAR, labels=[0]), 4.0),
        (_drawn(SQUARE, labels=[1]), 2.0),
        (_drawn(NEAR, labels=[1]), 6.0),
        (_drawn(ELSEWHERE, labels=[0]), 1.5 + 7.0),
        (_drawn(NEAR, SQUARE, labels=[0, 0]), 1.5),
        (_drawn(SQUARE, ELSEWHERE, SQUARE, labels=[1, 0, 0]), 3.0),
    ],
)
def test_human_seconds_each_repair_has_its_cost(drawn: Detections, seconds: float) -> None:
    assert human_seconds(drawn, _truth(SQUARE, labels=[0]), COSTS) == pytest.approx(3.3 + seconds)


def test_human_seconds_empty_image_costs_a_look_and_each_deletion() -> None:
    assert human_seconds(_drawn(labels=[]), _truth(labels=[]), COSTS) == 3.3
    assert human_seconds(_drawn(SQUARE, labels=[2]), _truth(labels=[]), COSTS) == 4.8
    assert by_hand(_truth(SQUARE, NEAR, labels=[0, 1]), SLOW) == pytest.approx(3.3 + 55.2)


def _tries_everything(drawn: Detections, sample: Sample, costs: CostModel) -> float:
    """The cheapest of all ways to pair boxes with objects."""

    def iou(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float:
        size = np.maximum(0, np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]))
        both = float(size.prod())
        return both / (float((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod()) - both)

    def price(i: int, j: int | None) -> float:
        if j is None:
            return costs.delete
        overlap = iou(drawn.boxes[i].astype(float), sample.boxes[j].astype(float))
        if overlap < 0.5:
            return np.inf
        corrected = costs.correct if overlap < 0.75 else 0.0
        return corrected + costs.relabel * bool(drawn.labels[i] != sample.labels[j])

    objects = range(len(sample.labels))
    best = np.inf
    for pairing in itertools.product([None, *objects], repeat=len(drawn)):
        used = [j for j in pairing if j is not None]
        if len(used) == len(set(used)):
            spent = sum(price(i, j) for i, j in enumerate(pairing))
            best = min(best, spent + costs.draw * (len(objects) - len(used)))
    return costs.look + best


@pytest.mark.parametrize("seed", range(6))
def test_human_seconds_any_scene_is_the_cheapest_assignment(seed: int) -> None:
    found, truth = scene(seed, 8)
    for drawn, sample in zip(found, truth, strict=True):
        few = drawn.where(np.arange(len(drawn)) < 5)
        some = Sample("1", Path("x"), sample.boxes[:4], sample.labels[:4])
        for costs in (COSTS, SLOW):
            wanted = _tries_everything(few, some, costs)
            assert human_seconds(few, some, costs) == pytest.approx(wanted, abs=1e-4)


def _spent(
    found: list[Detections],
    truth: list[Sample],
    thresholds: npt.NDArray[np.float64],
    costs: CostModel,
) -> float:
    return sum(
        human_seconds(shown(f, thresholds[f.labels]), s, costs)
        for f, s in zip(found, truth, strict=True)
    )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("costs", [COSTS, SLOW], ids=["7 s", "27.6 s"])
def test_cheapest_thresholds_any_scene_match_brute_force(
    monkeypatch: pytest.MonkeyPatch, seed: int, costs: CostModel
) -> None:
    monkeypatch.setattr("ml_backend.detection.costs.BELIEF", 0)
    found, truth = scene(seed, 25, noise=9)
    found = [f.where(f.labels < 2) for f in found]
    chosen = cheapest_thresholds(found, truth, LABELS, costs)
    steps = [*np.unique(np.concatenate([f.scores for f in found]).round(2)) - 0.005, NEVER]
    best = min(
        _spent(found, truth, np.array([a, b, 1.0, 1.0]), costs)
        for a, b in itertools.product(steps[::2], repeat=2)
    )
    mine = _spent(found, truth, np.array([chosen[label] for label in LABELS]), costs)
    assert mine <= best * 1.003
    assert mine <= _spent(found, truth, np.full(4, costs.break_even), costs)


def test_cheapest_thresholds_few_images_do_not_follow_chance(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def images(seed: int, count: int) -> tuple[list[Detections], list[Sample]]:
        """Boxes of which, with a confidence of p, the share p is right."""
        random = np.random.default_rng(seed)
        corner = np.stack([np.arange(8) * 50.0, np.zeros(8)], 1)
        boxes = np.concatenate([corner, corner + 40], 1).astype(np.float32)
        found, truth = [], []
        for number in range(count):
            scores = np.sort(random.uniform(0.01, 0.99, 8))[::-1].astype(np.float32)
            labels = random.integers(0, 2, 8)
            right = random.random(8) < scores
            found.append(Detections(boxes, scores, labels))
            truth.append(Sample(str(number), Path("x"), boxes[right], labels[right]))
        return found, truth

    others, there = images(99, 200)

    def spent_on_others(seed: int) -> float:
        chosen = cheapest_thresholds(*images(seed, 6), LABELS, SLOW)
        return _spent(others, there, np.array([chosen[label] for label in LABELS]), SLOW)

    careful = np.mean([spent_on_others(seed) for seed in range(10)])
    monkeypatch.setattr("ml_backend.detection.costs.BELIEF", 0)
    plain = np.mean([spent_on_others(seed) for seed in range(10)])
    assert careful < 0.99 * plain


def test_cheapest_thresholds_detector_always_wrong_show_nothing() -> None:
    truth = [_truth(SQUARE, labels=[0]) for _ in range(10 * BELIEF)]
    wrong = [_drawn(ELSEWHERE, labels=[0]) for _ in truth]
    right = [_drawn(SQUARE, labels=[0]) for _ in truth]
    assert cheapest_thresholds(wrong, truth, LABELS, COSTS)["car"] == NEVER
    assert cheapest_thresholds(right, truth, LABELS, COSTS)["car"] <= 0.9


def test_cheapest_thresholds_label_with_few_boxes_breaks_even() -> None:
    truth = [_truth(SQUARE, labels=[0]) for _ in range(FEW_BOXES - 1)]
    wrong = [_drawn(ELSEWHERE, labels=[0]) for _ in truth]
    assert cheapest_thresholds(wrong, truth, LABELS, COSTS)["car"] == pytest.approx(1.5 / 8.5)
    assert SLOW.break_even < COSTS.break_even


def test_cheapest_thresholds_slow_drawing_show_more_boxes() -> None:
    found, truth = scene(3, 60)
    quick = cheapest_thresholds(found, truth, LABELS, COSTS)
    slow = cheapest_thresholds(found, truth, LABELS, SLOW)
    assert all(slow[label] <= quick[label] for label in LABELS)
    assert any(slow[label] < quick[label] for label in LABELS)


def test_shown_two_labels_on_one_object_keeps_the_more_confident() -> None:
    both = _drawn(SQUARE, SQUARE, labels=[1, 0])
    kept = shown(both, np.zeros(2))
    assert kept.labels.tolist() == [1]
    # Where the surer one does not reach its threshold, it hides nothing.
    assert shown(both, np.array([0.95, 0.1])).labels.tolist() == [0]
    # Boxes of one label are the detector's own business, and what overlaps less stays.
    assert len(shown(_drawn(SQUARE, SQUARE, labels=[1, 1]), np.zeros(2))) == 2
    assert len(shown(_drawn(SQUARE, NEAR, labels=[1, 0]), np.zeros(2))) == 2
