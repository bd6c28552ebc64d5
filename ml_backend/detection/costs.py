"""Computes the cost of people's work on predicted boxes, and thresholds that minimise it.

A box that is shown may save drawing one, or cost deleting one. The likelihood of either is measured
on held-out images, and weighed by the seconds that drawing, correcting and deleting take.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import linear_sum_assignment
from torchvision.ops import box_iou

from ml_backend.detection.types import Detections, Sample

OVERLAPS = 0.5
"""IoU from which a box is corrected instead of drawn anew."""
LIES_RIGHT = 0.75
"""IoU from which a box is left as it is."""
DUPLICATE = 0.7
"""IoU from which two boxes of different labels are taken for one object."""
FEW_BOXES = 5
"""Held-out boxes of a label below which its threshold follows from the costs alone."""
BELIEF = 20
"""Weight of the confidences in the choice of a threshold, in images: the threshold that is cheapest
on a few dozen images is so mostly by chance. With thresholds from 10 photographs of blood cells,
people who used `tiny` were 8.5 times as fast on other images as with drawing at 27.6 s a box, and
7.5 times as fast with this weight at 0."""
CANDIDATES = 40
"""Thresholds of a label that are tried at most."""
NEVER = 1.01
"""A threshold that shows nothing."""

_Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class CostModel:
    """The seconds that a person takes for each action.

    Attributes:
        look: to look at an image.
        draw: to draw a box: 7.0 by extreme clicking (Papadopoulos et al., 2017); the story of this
            project took 27.6.
        correct: to move or resize one that overlaps an object with an IoU of 0.5 to 0.75.
        delete: to delete a wrong one.
        relabel: to change the label of one.
    """

    look: float
    draw: float
    correct: float
    delete: float
    relabel: float

    @property
    def break_even(self) -> float:
        """Computes the confidence from which showing a box costs less than hiding it."""
        return self.delete / (self.delete + self.draw)


def shown(detections: Detections, thresholds: npt.NDArray[np.floating]) -> Detections:
    """Selects the detections that people are shown.

    Args:
        detections: of one image, most confident first.
        thresholds: float `[N]`, the confidence that each needs.

    Returns:
        Those that reach it, less the duplicates across labels: of two boxes of different labels
        that overlap by more than `DUPLICATE`, the more confident stays.
    """
    kept = detections.where(detections.scores >= thresholds)
    if len(kept) < 2 or (kept.labels == kept.labels[0]).all():
        return kept
    overlap = _iou(kept.boxes, kept.boxes) > DUPLICATE
    overlap &= kept.labels[:, None] != kept.labels[None, :]
    stays = np.ones(len(kept), bool)
    for i in range(1, len(kept)):
        stays[i] = not (overlap[i, :i] & stays[:i]).any()
    return kept.where(stays)


def thresholds_by_index(labels: Sequence[str], thresholds: Mapping[str, float]) -> _Floats:
    """Puts thresholds in the order of labels: float64 `[C]`, infinite where a label has none."""
    return np.array([thresholds.get(label, np.inf) for label in labels])


def human_seconds(drawn: Detections, sample: Sample, costs: CostModel) -> float:
    """Computes the seconds until a person has made the boxes of one image right.

    Each predicted box is left, corrected, relabelled, or deleted; what is missing is drawn. The
    person does what takes least in all (an assignment; Kuhn, 1955).

    Args:
        drawn: the boxes that are shown.
        sample: the annotated image.
        costs: seconds of each action.
    """
    return costs.look + _repairs(_savings(drawn, sample, costs), len(sample.labels), costs)


def by_hand(sample: Sample, costs: CostModel) -> float:
    """Computes the seconds until a person has drawn every box of one image."""
    return costs.look + costs.draw * len(sample.labels)


def cheapest_thresholds(
    predictions: Sequence[Detections],
    samples: Sequence[Sample],
    labels: Sequence[str],
    costs: CostModel,
) -> dict[str, float]:
    """Finds for each label the threshold that makes the samples cost people least.

    Coordinate descent on the exact cost, since labels compete for objects: one label after the
    other, until no threshold improves it. Few images say little: to their cost is added that of
    `BELIEF` more, in which of the same boxes as many are right as their confidences say. It begins
    at the confidence that breaks even, where labels with few boxes stay.

    Args:
        predictions: for each sample the calibrated detections, down to a low confidence, of a
            detector that has not learned it.
        samples: the annotated images.
        labels: label names.
        costs: seconds of each action.

    Returns:
        Confidence by label; `NEVER` where no box of a label is worth showing.
    """
    images = [_Image(p, s, costs) for p, s in zip(predictions, samples, strict=True)]
    support = np.zeros(len(labels), np.int64)
    for sample in samples:
        support += np.bincount(sample.labels, minlength=len(labels))
    chosen = np.full(len(labels), costs.break_even)
    spent = np.array([image.seconds(chosen) for image in images])
    belief = BELIEF / max(1, len(images))
    improving = True
    while improving:
        improving = False
        for c in range(len(labels)):
            if support[c] < FEW_BOXES:
                continue
            # Only images with such a box can change.
            touched = [i for i, image in enumerate(images) if c in image.labels]
            if not touched:
                continue
            scores = np.concatenate([images[i].scores_of(c) for i in touched])
            best: tuple[float, _Floats] | None = None
            least = float(spent[touched].sum()) + belief * _hiding(scores, chosen[c], costs)
            for threshold in _candidates(scores):
                tried = chosen.copy()
                tried[c] = threshold
                seconds = np.array([images[i].seconds(tried) for i in touched])
                worth = float(seconds.sum()) + belief * _hiding(scores, threshold, costs)
                if worth < least - 1e-9:
                    least, best = worth, (threshold, seconds)
            if best is not None:
                chosen[c], spent[touched] = best
                improving = True
    return {label: float(chosen[c]) for c, label in enumerate(labels)}


def without_costly(
    predictions: Sequence[Detections],
    samples: Sequence[Sample],
    labels: Sequence[str],
    thresholds: Mapping[str, float],
    costs: CostModel,
) -> dict[str, float]:
    """Withholds the labels whose boxes did not save people time on the samples.

    Weak suggestions cost more than their correction: the quality of the first ones shapes how
    carefully people correct later ones.

    Args:
        predictions: for each sample the calibrated detections of a detector that has not learned
            it.
        samples: the annotated images.
        labels: label names.
        thresholds: confidence by label.
        costs: seconds of each action.

    Returns:
        The thresholds; `NEVER` for such labels.
    """
    images = [_Image(p, s, costs) for p, s in zip(predictions, samples, strict=True)]
    chosen = thresholds_by_index(labels, thresholds)
    for c, label in enumerate(labels):
        if label not in thresholds:
            continue
        hidden = chosen.copy()
        hidden[c] = NEVER
        if sum(i.seconds(hidden) for i in images) <= sum(i.seconds(chosen) for i in images):
            chosen = hidden
    return {label: float(chosen[i]) for i, label in enumerate(labels) if label in thresholds}


class _Image:
    """One image's candidates, with the seconds that each would save."""

    def __init__(self, found: Detections, sample: Sample, costs: CostModel) -> None:
        self._found = found.ranked()
        self.labels = frozenset(found.labels.tolist())
        self._costs = costs
        self._boxes = len(sample.labels)
        self._savings = _savings(self._found, sample, costs)
        # Which candidate would be hidden by which, as in `shown`.
        self._twins = _iou(self._found.boxes, self._found.boxes) > DUPLICATE
        self._twins &= self._found.labels[:, None] != self._found.labels[None, :]
        self._known: dict[bytes, float] = {}

    def scores_of(self, label: int) -> npt.NDArray[np.float32]:
        scores: npt.NDArray[np.float32] = self._found.scores[self._found.labels == label]
        return scores

    def seconds(self, thresholds: _Floats) -> float:
        stays = self._found.scores >= thresholds[self._found.labels]
        for i in np.flatnonzero(stays & (np.tril(self._twins, -1) & stays[None, :]).any(axis=1)):
            stays[i] = not (self._twins[i, :i] & stays[:i]).any()
        key = stays.tobytes()
        if key not in self._known:
            self._known[key] = _repairs(self._savings[stays], self._boxes, self._costs)
        return self._known[key]


def _savings(drawn: Detections, sample: Sample, costs: CostModel) -> _Floats:
    """Computes the seconds saved, `[N, M]`, where box `n` is made object `m` and not deleted."""
    if not len(drawn) or not len(sample.labels):
        return np.zeros((len(drawn), len(sample.labels)))
    iou = _iou(drawn.boxes, sample.boxes)
    repair = np.where(iou < LIES_RIGHT, costs.correct, 0.0)
    repair += np.where(drawn.labels[:, None] != sample.labels[None, :], costs.relabel, 0.0)
    saved = costs.delete + costs.draw - repair
    return np.where(iou >= OVERLAPS, np.maximum(saved, 0.0), 0.0)


def _repairs(savings: _Floats, boxes: int, costs: CostModel) -> float:
    spent = costs.delete * len(savings) + costs.draw * boxes
    if savings.any():
        rows, columns = linear_sum_assignment(savings, maximize=True)
        spent -= float(savings[rows, columns].sum())
    return spent


def _hiding(scores: npt.NDArray[np.float32], threshold: float, costs: CostModel) -> float:
    """Computes the seconds that hiding boxes below a threshold costs, if confidences are right."""
    hidden = scores[scores < threshold]
    return float((hidden * (costs.draw + costs.delete) - costs.delete).sum())


def _candidates(scores: npt.NDArray[np.float32]) -> list[float]:
    """Lists thresholds to try: between scores, at most `CANDIDATES`, and `NEVER`."""
    values = np.unique(scores)
    if len(values) > CANDIDATES:
        values = np.quantile(values, np.linspace(0, 1, CANDIDATES), method="nearest")
    # Just below a score, so that rounding hides none that it means to show.
    return [math.floor(1e4 * float(v)) / 1e4 for v in values] + [NEVER]


def _iou(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    iou: npt.NDArray[np.float32] = box_iou(torch.from_numpy(a), torch.from_numpy(b)).numpy()
    return iou
