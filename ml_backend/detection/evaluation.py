"""Measures detections: average precision, intervals, paired comparisons, agreement.

Average precision is COCO's (101 recall points; pycocotools), computed from detections that are
matched to boxes once for each image, so that resampling images costs no matching; no library
offers this. The tests compare the results with faster-coco-eval.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torchvision.ops import box_iou

from ml_backend.detection.types import Detections, Sample

THRESHOLDS = tuple(float(t) for t in np.arange(0.5, 1.0, 0.05).round(2))
"""IoU thresholds of COCO's mean average precision."""
_RECALLS = np.linspace(0, 1, 101)
MOST = 100
"""Detections of an image and class that count at most, as in COCO."""

_Floats = npt.NDArray[np.float64]
_Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class ClassQuality:
    """Quality on one class.

    Attributes:
        ap50: average precision at IoU 0.5; None where there is no box of the class.
        ap: mean over IoU 0.50:0.95; None likewise.
        recall: share of boxes found at IoU 0.5, at any confidence.
        support: number of boxes.
        images: number of images that hold one.
    """

    ap50: float | None
    ap: float | None
    recall: float | None
    support: int
    images: int


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Quality on all classes.

    Attributes:
        map50: mean of `ap50` over the classes that have boxes; 0 where none has.
        map: mean of `ap` likewise.
        per_class: quality by label.
        images: number of images.
    """

    map50: float
    map: float
    per_class: dict[str, ClassQuality]
    images: int


@dataclass(frozen=True, slots=True)
class Interval:
    """A bootstrap interval.

    Attributes:
        low: lower end.
        high: upper end.
        level: share of the resamples inside.
    """

    low: float
    high: float
    level: float


@dataclass(frozen=True, slots=True)
class ClassChange:
    """Difference of one class's AP50, and the number of boxes that it rests on."""

    delta: float
    support: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """Detector A minus detector B, in AP50 over the same images.

    The mean is over the labels that B knows, where it knows any of those that there are: labels
    that A alone knows do not make up for what A lost.

    Attributes:
        delta: of the means, on the images as they are.
        low: lower end of the 90 % interval over resampled images.
        high: upper end.
        probability_better: share of the resamples in which A is better.
        per_class: changes by label, of all labels.
    """

    delta: float
    low: float
    high: float
    probability_better: float
    per_class: dict[str, ClassChange]


def evaluate(
    predictions: Sequence[Detections], samples: Sequence[Sample], labels: Sequence[str]
) -> Evaluation:
    """Measures detections against samples, image by image in the same order.

    Args:
        predictions: for each sample the detections, down to a low confidence.
        samples: the annotated images.
        labels: label names.
    """
    matched = _Matched(predictions, samples, len(labels))
    everything = np.arange(len(samples))
    ap = matched.average_precision(everything, THRESHOLDS)
    per_class: dict[str, ClassQuality] = {}
    for c, label in enumerate(labels):
        support = int(matched.boxes[:, c].sum())
        per_class[label] = ClassQuality(
            ap50=float(ap[0, c]) if support else None,
            ap=float(ap[:, c].mean()) if support else None,
            recall=matched.recall(c) if support else None,
            support=support,
            images=int((matched.boxes[:, c] > 0).sum()),
        )
    return Evaluation(
        map50=_mean(ap[0]), map=_mean(ap.mean(axis=0)), per_class=per_class, images=len(samples)
    )


def bootstrap_interval(
    predictions: Sequence[Detections],
    samples: Sequence[Sample],
    labels: Sequence[str],
    *,
    seed: int,
    rounds: int = 300,
    level: float = 0.9,
) -> Interval:
    """Computes the interval of the mean AP50: percentile bootstrap over images (Efron, 1979)."""
    matched = _Matched(predictions, samples, len(labels))
    random = np.random.default_rng(seed)
    values = [
        _mean(matched.average_precision(_resample(random, len(samples)), (0.5,))[0])
        for _ in range(rounds)
    ]
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high), level)


def compare(
    a: Sequence[Detections],
    b: Sequence[Detections],
    samples: Sequence[Sample],
    labels: Sequence[str],
    *,
    known: Collection[str] = (),
    seed: int,
    rounds: int = 300,
) -> Comparison:
    """Compares two detectors on the same images: both see the same resamples.

    Args:
        a: for each sample the detections of A.
        b: for each sample the detections of B.
        samples: the annotated images.
        labels: label names.
        known: labels that B knows; all where not given.
        seed: of the resamples.
        rounds: number of them.
    """
    first = _Matched(a, samples, len(labels))
    second = _Matched(b, samples, len(labels))
    everything = np.arange(len(samples))
    ap_a = first.average_precision(everything, (0.5,))[0]
    ap_b = second.average_precision(everything, (0.5,))[0]
    support = first.boxes.sum(axis=0)
    counts = np.array([label in known for label in labels], bool) & (support > 0)
    if not counts.any():
        counts[:] = True
    random = np.random.default_rng(seed)
    deltas = []
    for _ in range(rounds):
        chosen = _resample(random, len(samples))
        deltas.append(
            _mean(first.average_precision(chosen, (0.5,))[0][counts])
            - _mean(second.average_precision(chosen, (0.5,))[0][counts])
        )
    return Comparison(
        delta=_mean(ap_a[counts]) - _mean(ap_b[counts]),
        low=float(np.quantile(deltas, 0.05)),
        high=float(np.quantile(deltas, 0.95)),
        probability_better=float(np.mean(np.array(deltas) > 0)),
        per_class={
            label: ClassChange(float(ap_a[c] - ap_b[c]), int(support[c]))
            for c, label in enumerate(labels)
            if support[c]
        },
    )


def hits_of(
    predictions: Sequence[Detections], samples: Sequence[Sample], classes: int
) -> list[_Bools]:
    """Tells for each image which detections are right, bool `[N]`.

    A detection is right if it overlaps a box of its class, not taken by a more confident one, with
    an IoU of 0.5.
    """
    answer: list[_Bools] = []
    for found, sample in zip(predictions, samples, strict=True):
        hits = np.zeros(len(found), bool)
        for c in range(classes):
            mine = found.labels == c
            hits[mine] = _match(found.boxes[mine], sample.boxes[sample.labels == c], (0.5,))[0]
        answer.append(hits)
    return answer


def agreement(a: Sequence[Detections], b: Sequence[Detections]) -> float:
    """Measures how alike the boxes are that two detectors show: F1 at IoU 0.5.

    Args:
        a: boxes that are shown, image by image, labels as indices into the same names.
        b: the other's, of the same images.

    Returns:
        1 where each box of one matches one of the other, and where neither shows any.
    """
    alike = boxes = 0
    for one, other in zip(a, b, strict=True):
        boxes += len(one) + len(other)
        for c in np.unique(one.labels):
            mine, theirs = one.where(one.labels == c), other.where(other.labels == c)
            alike += int(_match(mine.boxes, theirs.boxes, (0.5,))[0].sum())
    return 2 * alike / boxes if boxes else 1.0


class _Matched:
    """Detections matched to boxes, by image and class.

    Attributes:
        boxes: number of boxes, int64 `[images, classes]`.
    """

    def __init__(
        self, predictions: Sequence[Detections], samples: Sequence[Sample], classes: int
    ) -> None:
        if len(predictions) != len(samples):
            raise ValueError(f"{len(predictions)} predictions for {len(samples)} samples")
        self.boxes = np.zeros((len(samples), classes), np.int64)
        images: list[list[int]] = [[] for _ in range(classes)]
        scores: list[list[npt.NDArray[np.float32]]] = [[] for _ in range(classes)]
        hits: list[list[_Bools]] = [[] for _ in range(classes)]
        for number, (found, sample) in enumerate(zip(predictions, samples, strict=True)):
            for c in range(classes):
                truth = sample.boxes[sample.labels == c]
                self.boxes[number, c] = len(truth)
                mine = found.where(found.labels == c)
                order = np.argsort(-mine.scores, kind="stable")[:MOST]
                if not len(order):
                    continue
                images[c].append(number)
                scores[c].append(mine.scores[order])
                hits[c].append(_match(mine.boxes[order], truth))
        self._classes = [
            _Class(np.array(i, np.int64), s, h)
            for i, s, h in zip(images, scores, hits, strict=True)
        ]

    def ranked(
        self, c: int, chosen: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.float32], _Bools]:
        """Ranks a class over chosen images: scores `[D]`, descending; hits `[thresholds, D]`."""
        return self._classes[c].ranked(np.bincount(chosen, minlength=len(self.boxes)))

    def recall(self, c: int) -> float:
        """Computes the share of a class's boxes that are found at IoU 0.5."""
        _, hits = self.ranked(c, np.arange(len(self.boxes)))
        return float(hits[0].sum() / max(1, self.boxes[:, c].sum()))

    def average_precision(
        self, chosen: npt.NDArray[np.int64], thresholds: Sequence[float]
    ) -> _Floats:
        """Computes AP, `[thresholds, classes]`; NaN where the images hold no box of a class."""
        result = np.full((len(thresholds), len(self._classes)), np.nan)
        support = self.boxes[chosen].sum(axis=0)
        for c in range(len(self._classes)):
            if not support[c]:
                continue
            _, hits = self.ranked(c, chosen)
            for t in range(len(thresholds)):
                result[t, c] = _average_precision(hits[t], int(support[c]))
        return result


class _Class:
    """All detections of one class, sorted by score once."""

    def __init__(
        self,
        images: npt.NDArray[np.int64],
        scores: Sequence[npt.NDArray[np.float32]],
        hits: Sequence[_Bools],
    ) -> None:
        self._image: npt.NDArray[np.int64]
        self._scores: npt.NDArray[np.float32]
        self._hits: _Bools
        if not len(images):
            self._image = np.zeros(0, np.int64)
            self._scores = np.zeros(0, np.float32)
            self._hits = np.zeros((len(THRESHOLDS), 0), bool)
            return
        image = np.repeat(images, [len(s) for s in scores])
        score = np.concatenate(scores)
        order = np.argsort(-score, kind="stable")
        self._image = image[order]
        self._scores = score[order]
        self._hits = np.concatenate(hits, axis=1)[:, order]

    def ranked(self, times: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.float32], _Bools]:
        repeats = times[self._image]
        if (repeats == 1).all():
            return self._scores, self._hits
        chosen = np.repeat(np.arange(len(repeats)), repeats)
        return self._scores[chosen], self._hits[:, chosen]


def _match(
    boxes: npt.NDArray[np.float32],
    truth: npt.NDArray[np.float32],
    thresholds: Sequence[float] = THRESHOLDS,
) -> _Bools:
    """Matches greedily in order of confidence, as pycocotools does; answers `[thresholds, D]`."""
    hits = np.zeros((len(thresholds), len(boxes)), bool)
    if not len(truth):
        return hits
    iou = box_iou(torch.from_numpy(boxes), torch.from_numpy(truth)).numpy()
    for t, threshold in enumerate(thresholds):
        free = np.ones(len(truth), bool)
        for d in range(len(boxes)):
            overlap = np.where(free, iou[d], -1.0)
            best = int(overlap.argmax())
            if overlap[best] >= min(threshold, 1 - 1e-10):
                hits[t, d] = True
                free[best] = False
    return hits


def _average_precision(hits: _Bools, support: int) -> float:
    if not len(hits):
        return 0.0
    found = np.cumsum(hits)
    precision = found / np.arange(1, len(hits) + 1)
    recall = found / support
    # The best precision at this recall or a higher one.
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    index = np.searchsorted(recall, _RECALLS, side="left")
    return float(np.where(index < len(hits), envelope[np.minimum(index, len(hits) - 1)], 0).mean())


def _mean(values: npt.NDArray[np.float64]) -> float:
    return float(np.nanmean(values)) if np.isfinite(values).any() else 0.0


def _resample(random: np.random.Generator, size: int) -> npt.NDArray[np.int64]:
    return random.integers(0, size, size)
