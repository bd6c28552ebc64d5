"""Leaves a share of the tasks to chance, whatever the strategy: epsilon-greedy exploration.

The hold-out is drawn from these tasks: images that a strategy chose are no fair sample of the
project.
"""

from __future__ import annotations

from collections.abc import Sequence

from ml_backend.acquisition.reference import Reference
from ml_backend.acquisition.stable_random import chance
from ml_backend.acquisition.strategies.base import Strategy
from ml_backend.acquisition.strategies.random import Random
from ml_backend.detection.types import Detections


def in_random_share(task: int, share: float) -> bool:
    """Tells whether a task's place in the order is random. The id alone decides, for every version.

    Args:
        task: Label Studio's id.
        share: fraction of all tasks, in `[0, 1]`; a larger one only adds tasks.
    """
    return chance(f"chance:{task}") < share


class RandomShare:
    """Scores with another strategy, except for a share of the tasks, which get random scores.

    Args:
        strategy: scores the other tasks.
        share: fraction of the tasks with random scores, in `[0, 1]`.
        version: name of the model version, the seed.
    """

    def __init__(self, strategy: Strategy, share: float, version: str) -> None:
        self._strategy = strategy
        self._share = share
        self._random = Random(Reference.unknown(0), version)

    def score(self, tasks: Sequence[int | None], candidates: Sequence[Detections]) -> list[float]:
        """Computes acquisition scores; see `Strategy`."""
        scores = self._strategy.score(tasks, candidates)
        random = self._random.score(tasks, candidates)
        return [
            by_chance if task is not None and in_random_share(task, self._share) else score
            for task, score, by_chance in zip(tasks, scores, random, strict=True)
        ]
