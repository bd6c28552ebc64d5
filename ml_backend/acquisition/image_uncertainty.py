"""Measures how uncertain a detector is about one image."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torchvision.ops import box_iou

from ml_backend.acquisition.reference import Float64Array
from ml_backend.detection.types import Detections

TOP = 10
"""Number of objects of an image that count, the most uncertain ones."""
SAME_OBJECT_IOU = 0.5
"""IoU from which two candidates are taken for one object."""


def image_uncertainty(candidates: Detections, weights: Float64Array) -> float:
    """Measures how uncertain a detector is about an image.

    Overlapping candidates count as one object, as in entropy-aware suppression (Wu et al.,
    "Entropy-based active learning for object detection", CVPR 2022). An object's uncertainty is the
    binary entropy of its calibrated confidence, plus the entropy between two competing labels, plus
    the disagreement of its candidates about the box. A candidate of confidence 0.1, a probably
    missed object, still counts almost half a bit. The `TOP` most uncertain objects are summed: a
    mean over all objects would prefer clutter, a sum over all would prefer crowds.

    Args:
        candidates: detections down to a low confidence, most confident first, calibrated, before
            any threshold.
        weights: float64 `[C]`, factor of each label.

    Returns:
        The weighted sum over the `TOP` most uncertain objects, divided by `TOP`, in bits.
    """
    uncertainties = []
    for first, members in _objects(candidates):
        p = float(candidates.scores[first])
        label = candidates.labels[first]
        others = members[candidates.labels[members] != label]
        rival = float(candidates.scores[others].max(initial=0.0))
        bits = _entropy(p) + p * _entropy(rival / max(p + rival, 1e-9))
        bits += p * _box_disagreement(candidates, first, members)
        uncertainties.append(float(weights[label]) * bits)
    return float(np.sum(np.sort(uncertainties)[::-1][:TOP])) / TOP


def _objects(candidates: Detections) -> list[tuple[int, npt.NDArray[np.intp]]]:
    """Groups overlapping candidates: for each object its most confident one, and all members."""
    if not len(candidates):
        return []
    boxes = torch.from_numpy(candidates.boxes)
    overlaps = box_iou(boxes, boxes).numpy() >= SAME_OBJECT_IOU
    free = np.ones(len(candidates), bool)
    groups = []
    for i in range(len(candidates)):
        if free[i]:
            members = np.flatnonzero(overlaps[i] & free)
            free[members] = False
            groups.append((i, members))
    return groups


def _box_disagreement(candidates: Detections, first: int, members: npt.NDArray[np.intp]) -> float:
    """Measures how much one object's candidates of one label differ in their box, in `[0, 1]`."""
    same = members[candidates.labels[members] == candidates.labels[first]]
    if len(same) < 2:
        return 0.0
    iou = box_iou(
        torch.from_numpy(candidates.boxes[[first]]), torch.from_numpy(candidates.boxes[same])
    )[0].numpy()
    share = candidates.scores[same] / candidates.scores[same].sum()
    # Members have an IoU of at least 0.5, so that twice the mean of 1 - IoU spans [0, 1].
    return float(np.clip(2 * (share * (1 - iou)).sum(), 0.0, 1.0))


def _entropy(p: float) -> float:
    """Computes the binary entropy, in bits."""
    if not 0.0 < p < 1.0:
        return 0.0
    return float(-p * np.log2(p) - (1 - p) * np.log2(1 - p))
