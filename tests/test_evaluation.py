"""Average precision against COCO's own evaluation, and what is built on it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from faster_coco_eval import COCO
from faster_coco_eval.core.faster_eval_api import COCOeval_faster

from ml_backend.detection.evaluation import (
    agreement,
    bootstrap_interval,
    compare,
    evaluate,
)
from ml_backend.detection.types import Detections, Sample
from tests.scenes import LABELS, scene


def _oracle(found: list[Detections], truth: list[Sample]) -> Any:
    def coco_box(box: Any) -> list[float]:
        x1, y1, x2, y2 = map(float, box)
        return [x1, y1, x2 - x1, y2 - y1]

    annotations = [
        {
            "image_id": i,
            "category_id": int(label) + 1,
            "bbox": coco_box(box),
            "area": coco_box(box)[2] * coco_box(box)[3],
            "iscrowd": 0,
        }
        for i, sample in enumerate(truth)
        for box, label in zip(sample.boxes, sample.labels, strict=True)
    ]
    for number, annotation in enumerate(annotations, 1):
        annotation["id"] = number
    reference = COCO(
        {
            "images": [{"id": i, "width": 500, "height": 500} for i in range(len(truth))],
            "categories": [{"id": c + 1, "name": name} for c, name in enumerate(LABELS)],
            "annotations": annotations,
        }
    )
    detections = [
        {"image_id": i, "category_id": int(c) + 1, "bbox": coco_box(box), "score": float(score)}
        for i, d in enumerate(found)
        for box, score, c in zip(d.boxes, d.scores, d.labels, strict=True)
    ]
    judge = COCOeval_faster(reference, reference.loadRes(detections), "bbox", print_function=_quiet)
    judge.run()
    return judge.eval["precision"]


def _quiet(*_: object) -> None:
    """The oracle prints; nobody reads it."""


@pytest.mark.parametrize("seed", range(5))
def test_evaluate_random_scenes_agrees_with_coco(seed: int) -> None:
    found, truth = scene(seed, 40)
    ours = evaluate(found, truth, LABELS)
    # [thresholds, recalls, classes, areas, most detections]: all areas, 100 detections.
    precision = _oracle(found, truth)[:, :, :, 0, -1]
    for c, label in enumerate(LABELS[:3]):
        quality = ours.per_class[label]
        assert quality.ap50 == pytest.approx(precision[0, :, c].mean(), abs=1e-3)
        assert quality.ap == pytest.approx(precision[:, :, c].mean(), abs=1e-3)
    assert ours.map50 == pytest.approx(precision[0, :, :3].mean(), abs=1e-3)
    assert ours.map == pytest.approx(precision[:, :, :3].mean(), abs=1e-3)
    assert ours.per_class["never"].ap50 is None
    assert ours.per_class["never"].support == 0


def test_evaluate_perfect_or_absent_detections_gives_one_or_zero() -> None:
    _, truth = scene(0, 10)
    perfect = [
        Detections(s.boxes, np.full(len(s.labels), 0.9, np.float32), s.labels) for s in truth
    ]
    assert evaluate(perfect, truth, LABELS).map == pytest.approx(1.0)
    nothing = [Detections.empty() for _ in truth]
    assert evaluate(nothing, truth, LABELS).map50 == 0
    assert evaluate(nothing[:0], [], LABELS).map50 == 0


def test_bootstrap_interval_more_images_is_narrower_around_the_estimate() -> None:
    widths = {}
    for images in (10, 160):
        found, truth = scene(3, images)
        interval = bootstrap_interval(found, truth, LABELS, seed=0)
        assert interval.low <= evaluate(found, truth, LABELS).map50 <= interval.high
        assert interval == bootstrap_interval(found, truth, LABELS, seed=0)
        widths[images] = interval.high - interval.low
    assert widths[160] < 0.6 * widths[10]


def test_compare_detector_with_itself_is_zero() -> None:
    found, truth = scene(1, 30)
    same = compare(found, found, truth, LABELS, seed=0)
    assert (same.delta, same.low, same.high, same.probability_better) == (0, 0, 0, 0)


def test_compare_worse_detector_has_negative_delta() -> None:
    good, truth = scene(1, 60, noise=2)
    bad = [d.where(np.arange(len(d)) % 2 == 0) for d in good]
    worse = compare(bad, good, truth, LABELS, seed=0)
    better = compare(good, bad, truth, LABELS, seed=0)
    assert worse.high < 0 < better.low
    assert better.delta == pytest.approx(-worse.delta)
    assert better.probability_better > 0.99 > 0.01 > worse.probability_better
    assert set(better.per_class) == set(LABELS[:3])


def test_compare_label_of_one_detector_alone_does_not_count_in_the_mean() -> None:
    found, truth = scene(1, 60, noise=2)
    # The live one does not know valves (2); the new one does, and lost half of the rest.
    live = [d.where(d.labels != 2) for d in found]
    new = [d.where((d.labels == 2) | (np.arange(len(d)) % 2 == 0)) for d in found]
    over_all = compare(new, live, truth, LABELS, seed=0)
    assert over_all.delta > 0
    over_known = compare(new, live, truth, LABELS, known=LABELS[:2], seed=0)
    assert over_known.high < 0
    assert over_known.probability_better == 0
    assert over_known.per_class == over_all.per_class
    falls = [over_known.per_class[label].delta for label in LABELS[:2]]
    assert over_known.delta == pytest.approx(sum(falls) / 2)
    # A label without a box says nothing.
    assert compare(new, live, truth, LABELS, known=("never",), seed=0) == over_all


def test_agreement_counts_boxes_that_both_show() -> None:
    found, _ = scene(1, 20)
    assert agreement(found, found) == 1.0
    fewer = [d.where(np.arange(len(d)) % 2 == 0) for d in found]
    kept, all_of_it = sum(map(len, fewer)), sum(map(len, found))
    assert agreement(fewer, found) == pytest.approx(2 * kept / (kept + all_of_it), abs=0.03)
    others = [Detections(d.boxes, d.scores, (d.labels + 1) % 4) for d in found]
    assert agreement(found, others) < 0.3
    assert agreement([Detections.empty()], [Detections.empty()]) == 1.0


def test_evaluate_fewer_predictions_than_samples_raises_error() -> None:
    found, truth = scene(0, 3)
    with pytest.raises(ValueError, match="2 predictions for 3 samples"):
        evaluate(found[:2], truth, LABELS)
