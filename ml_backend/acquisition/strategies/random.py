"""Asks for images in random order: a baseline."""

from __future__ import annotations

from collections.abc import Sequence

from ml_backend.acquisition.reference import Reference
from ml_backend.acquisition.stable_random import chance
from ml_backend.detection.types import Detections


class Random:
    """Scores by a random number that is the same each time for a task and a model version.

    Args:
        reference: not used.
        version: name of the model version, the seed.
    """

    def __init__(self, reference: Reference, version: str) -> None:
        self._seed = version

    def score(self, tasks: Sequence[int | None], candidates: Sequence[Detections]) -> list[float]:
        """Computes acquisition scores; see `Strategy`."""
        return [chance(f"{self._seed}:{task}") for task in tasks]
