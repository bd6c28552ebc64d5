"""Confidence that means what it says: of boxes with 0.8, four in five are right.

Platt's scaling (1999), by label: a logistic curve over the logit of what the network says, fitted
to hits and misses on images that were not learned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize
from scipy.special import expit, logit

from ml_backend.detection.evaluation import ranked_hits
from ml_backend.detection.types import Detections, Sample

Calibration = Mapping[str, tuple[float, float]]
"""Slope and intercept by label; a label that is missing keeps what the network says."""

_PRIOR = 4.0
"""Weight, in squared units, of the belief that the network is right: for labels with few boxes."""
_Array = npt.NDArray[np.float64]


def fit_calibration(
    predictions: Sequence[Detections], samples: Sequence[Sample], labels: Sequence[str]
) -> dict[str, tuple[float, float]]:
    """Fits the curves.

    Args:
        predictions: what an uncalibrated detector found on images that it had not learned.
        samples: what is there; a box is right that overlaps one of its label with an IoU of 0.5.
        labels: label names.

    Returns:
        Slope (positive) and intercept, for labels with any detection.
    """
    fitted: dict[str, tuple[float, float]] = {}
    for label, (scores, hits) in zip(
        labels, ranked_hits(predictions, samples, len(labels)), strict=True
    ):
        if len(scores):
            fitted[label] = _fit(_logit(scores), hits)
    return fitted


def calibrate(
    scores: npt.NDArray[np.float32],
    indices: npt.NDArray[np.int64],
    labels: Sequence[str],
    calibration: Calibration,
) -> npt.NDArray[np.float32]:
    """Calibrated confidences.

    Args:
        scores: float32 `[N]`, what the network says.
        indices: int64 `[N]`, into `labels`.
        labels: label names.
        calibration: the curves.
    """
    if not calibration or not len(scores):
        return scores
    slope, intercept = np.array([calibration.get(name, (1.0, 0.0)) for name in labels]).T
    calibrated = expit(slope[indices] * _logit(scores) + intercept[indices])
    return np.asarray(calibrated, np.float32)


def _fit(x: _Array, hits: npt.NDArray[np.bool_]) -> tuple[float, float]:
    y = hits.astype(np.float64)

    def loss(parameters: _Array) -> tuple[float, _Array]:
        slope, intercept = np.exp(parameters[0]), parameters[1]
        z = slope * x + intercept
        error = expit(z) - y
        value = np.logaddexp(0.0, z) - y * z
        # Towards slope 1 and intercept 0, where there is little to learn from.
        prior = 0.5 * _PRIOR * float(parameters @ parameters)
        gradient = np.array([float((error * x).sum()) * slope, float(error.sum())])
        return float(value.sum()) + prior, gradient + _PRIOR * parameters

    found = minimize(loss, np.zeros(2), jac=True, method="L-BFGS-B", bounds=[(-3, 3), (-8, 8)])
    return round(float(np.exp(found.x[0])), 5), round(float(found.x[1]), 5)


def _logit(scores: npt.NDArray[np.float32]) -> _Array:
    return np.asarray(logit(np.clip(scores.astype(np.float64), 1e-4, 1 - 1e-4)), np.float64)
