"""The acquisition score of a task: what Label Studio orders by, lowest first.

It is not a confidence: a region's `score` is. Low means that a label here teaches much.
"""

from __future__ import annotations

import numpy as np

from ml_backend.detection.types import Detections

TOP = 10
"""Candidates that count: a sum over all would prefer crowds, a mean would prefer clutter."""


def acquisition_score(candidates: Detections) -> float:
    """Scores a task in `[0, 1]` by the binary entropy of its most uncertain candidate boxes.

    Settles and Craven (2008) call it entropy sampling. A box of confidence 0.5 is as uncertain
    as can be; an image where nothing resembles an object is certain, and comes late.

    Args:
        candidates: detections down to a low confidence, before any threshold.

    Returns:
        1 minus the mean entropy, in bits, of the `TOP` most uncertain candidates; missing ones
        count as certain.
    """
    p = np.clip(candidates.scores.astype(np.float64), 1e-6, 1 - 1e-6)
    entropy = -(p * np.log2(p) + (1 - p) * np.log2(1 - p))
    top = np.sort(entropy)[::-1][:TOP]
    return float(np.clip(1.0 - top.sum() / TOP, 0.0, 1.0))
