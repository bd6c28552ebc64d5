"""An acquisition strategy as another package would add one: one file, and its registration."""

from __future__ import annotations

from collections.abc import Sequence

from ml_backend.acquisition.reference import Reference
from ml_backend.detection.types import Detections


class LargestFirst:
    """Asks for large objects first."""

    def __init__(self, reference: Reference, version: str) -> None:
        self.version = version

    def score(self, tasks: Sequence[int | None], candidates: Sequence[Detections]) -> list[float]:
        """Scores by the widest box."""
        return [float(1 / (1 + (c.boxes[:, 2] - c.boxes[:, 0]).max(initial=0))) for c in candidates]
