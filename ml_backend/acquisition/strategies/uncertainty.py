"""Asks for the most uncertain images first, however alike they are: a baseline."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ml_backend.acquisition.image_uncertainty import image_uncertainty
from ml_backend.acquisition.reference import Reference
from ml_backend.detection.types import Detections


class Uncertainty:
    """Scores by `image_uncertainty` alone.

    Args:
        reference: statistics of the model version's images.
        version: name of the model version; not used.
    """

    def __init__(self, reference: Reference, version: str) -> None:
        self._reference = reference

    def score(self, tasks: Sequence[int | None], candidates: Sequence[Detections]) -> list[float]:
        """Computes acquisition scores; see `Strategy`."""
        found = np.array([image_uncertainty(c, self._reference.weights) for c in candidates])
        return [float(s) for s in 1 - self._reference.uncertainty_rank(found)]
