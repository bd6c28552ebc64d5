"""Weighs labels by how hard and how rare they are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ml_backend.acquisition.reference import Float64Array


def label_weights(ap50: Sequence[float | None], boxes: Sequence[int]) -> Float64Array:
    """Computes the factor by which an uncertainty about each label counts.

    The difficulty term follows PPAL's "difficulty calibrated uncertainty" (Yang et al., "Plug and
    play active learning for object detection", CVPR 2024).

    Args:
        ap50: average precision of each label on images that were not trained on; None where it
            could not be measured, which counts as hard.
        boxes: number of boxes of each label that were trained on.

    Returns:
        float64 `[C]`: `2 - AP50`, times the fourth root of the label's rarity against the mean.
    """
    difficulty = np.array([1.0 if value is None else 1.0 - value for value in ap50])
    counts = np.maximum(np.array(boxes, np.float64), 1.0)
    rarity = np.clip((counts.mean() / counts) ** 0.25, 0.5, 2.0) if len(counts) else counts
    weights: Float64Array = (1.0 + difficulty) * rarity
    return weights
