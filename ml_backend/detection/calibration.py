"""Calibrates confidences: of boxes with a confidence of 0.8, four in five are right.

Platt's scaling (1999) by label, a logistic curve over the logit of the network's score, extended
by where a box lies and how large it is (Küppers et al., "Multivariate confidence calibration for
object detection", CVPR workshops 2020): people often leave out objects that an edge cuts off, or
that are smaller than the others. Fitted to hits and misses on images that were not learned.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize
from scipy.special import expit, logit

from ml_backend.detection.evaluation import hits_of
from ml_backend.detection.types import Detections, Sample

_PRIOR = 4.0
"""Weight, in squared units, of the belief that the network is right: for labels with few boxes."""
_ENOUGH = 60
"""Right boxes of a label from which size and edges are looked at: ten for each weight."""
_EDGE = 0.01
"""Share of the image's side within which a box touches its edge."""
_FAR = 3.0
"""Standard deviations of size beyond which nothing more is concluded."""
_Array = npt.NDArray[np.float64]
_Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Curve:
    """The calibration of one label: the logit of being right, linear in features of a box.

    Attributes:
        slope: factor of the network's logit; positive.
        intercept: added.
        edges: added where a box touches the left or right edge, and the upper or lower one.
        size: weights of the logarithms of width and height, and of their squares, standardised.
        centre: means of those logarithms (of width and height as shares of the image's).
        spread: their standard deviations.
    """

    slope: float = 1.0
    intercept: float = 0.0
    edges: tuple[float, ...] = (0.0, 0.0)
    size: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)
    centre: tuple[float, ...] = (0.0, 0.0)
    spread: tuple[float, ...] = (1.0, 1.0)

    def __call__(self, found: Detections) -> npt.NDArray[np.float32]:
        """Calibrates the confidences of detections of known size; answers float32 `[N]`."""
        rest = _surroundings(found, np.array(self.centre), np.array(self.spread))
        z = self.slope * _logit(found.scores) + self.intercept
        z += rest @ np.array((*self.edges, *self.size))
        return np.asarray(expit(z), np.float32)


Calibration = Mapping[str, Curve]
"""Curves by label; a label without one keeps the network's scores."""


def calibration_from(saved: Mapping[str, Mapping[str, object]]) -> dict[str, Curve]:
    """Makes curves from the JSON of `dataclasses.asdict`.

    Raises:
        TypeError, ValueError: the values are no curves.
    """
    known = {field.name for field in dataclasses.fields(Curve)}
    curves = {}
    for label, values in saved.items():
        if set(values) != known:
            raise ValueError(f"the calibration of {label} has {sorted(values)}")
        numbers = {
            name: tuple(map(float, value)) if isinstance(value, list) else float(value)  # type: ignore[arg-type]
            for name, value in values.items()
        }
        curves[label] = Curve(**numbers)  # type: ignore[arg-type]
    return curves


def fit_calibration(
    predictions: Sequence[Detections], samples: Sequence[Sample], labels: Sequence[str]
) -> dict[str, Curve]:
    """Fits the curves.

    Args:
        predictions: for each sample the detections of an uncalibrated detector that had not
            learned it, with the image's size.
        samples: the annotated images; a box is right that overlaps one of its label with an IoU
            of 0.5.
        labels: label names.

    Returns:
        Curves, for labels with any detection.
    """
    hits = hits_of(predictions, samples, len(labels))
    fitted: dict[str, Curve] = {}
    for c, label in enumerate(labels):
        found = [p.where(p.labels == c) for p in predictions]
        right = [h[p.labels == c] for h, p in zip(hits, predictions, strict=True)]
        if any(len(f) for f in found):
            fitted[label] = _fit(found, right)
    return fitted


def calibrate(found: Detections, labels: Sequence[str], calibration: Calibration) -> Detections:
    """Calibrates confidences, and sorts by them.

    Args:
        found: the uncalibrated detections, with the image's size.
        labels: label names.
        calibration: the curves.
    """
    if not calibration or not len(found):
        return found
    scores = found.scores.copy()
    for c in np.unique(found.labels).tolist():
        curve = calibration.get(labels[c])
        if curve is not None:
            mine = found.labels == c
            scores[mine] = curve(found.where(mine))
    return dataclasses.replace(found, scores=scores).ranked()


def _fit(found: Sequence[Detections], right: Sequence[_Bools]) -> Curve:
    y = np.concatenate(right).astype(np.float64)
    sizes = np.concatenate([_log_sizes(f) for f in found])
    # Of the right ones, where there are enough: wrong ones have any size.
    typical = sizes[y > 0] if y.sum() >= 2 else sizes
    centre, spread = typical.mean(axis=0), np.maximum(typical.std(axis=0), 0.1)
    x = np.concatenate([_logit(f.scores) for f in found])
    rest = np.concatenate([_surroundings(f, centre, spread) for f in found])
    if y.sum() < _ENOUGH:
        rest = np.zeros_like(rest)

    def loss(parameters: _Array) -> tuple[float, _Array]:
        slope = np.exp(parameters[0])
        z = slope * x + parameters[1] + rest @ parameters[2:]
        error = expit(z) - y
        value = np.logaddexp(0.0, z) - y * z
        # Towards what the network says, where there is little to learn from.
        prior = 0.5 * _PRIOR * float(parameters @ parameters)
        gradient = np.concatenate([[(error * x).sum() * slope, error.sum()], error @ rest])
        return float(value.sum()) + prior, gradient + _PRIOR * parameters

    bounds = [(-3.0, 3.0)] + [(-8.0, 8.0)] * (1 + rest.shape[1])
    best = minimize(loss, np.zeros(len(bounds)), jac=True, method="L-BFGS-B", bounds=bounds).x
    values = [round(float(v), 5) for v in best]
    return Curve(
        slope=round(float(np.exp(best[0])), 5),
        intercept=values[1],
        edges=tuple(values[2:4]),
        size=tuple(values[4:]),
        centre=tuple(centre.round(5).tolist()),
        spread=tuple(spread.round(5).tolist()),
    )


def _surroundings(found: Detections, centre: _Array, spread: _Array) -> _Array:
    """Computes features, float64 `[N, 6]`: edges touched, standardised sizes, and their squares."""
    width, height = _size(found)
    x1, y1, x2, y2 = found.boxes.astype(np.float64).T
    sides = np.minimum(x1, width - x2) < _EDGE * width
    ends = np.minimum(y1, height - y2) < _EDGE * height
    size = np.clip((_log_sizes(found) - centre) / spread, -_FAR, _FAR)
    return np.column_stack([sides, ends, size, size**2])


def _log_sizes(found: Detections) -> _Array:
    sides = (found.boxes[:, 2:] - found.boxes[:, :2]).astype(np.float64)
    return np.asarray(np.log(np.maximum(sides, 1e-3) / _size(found)), np.float64)


def _size(found: Detections) -> _Array:
    if found.size is None:
        raise ValueError("detections cannot be calibrated without the size of their image")
    return np.array(found.size, np.float64)


def _logit(scores: npt.NDArray[np.float32]) -> _Array:
    return np.asarray(logit(np.clip(scores.astype(np.float64), 1e-4, 1 - 1e-4)), np.float64)
