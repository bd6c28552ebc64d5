"""Defines the contract of an acquisition strategy.

An acquisition score lies in `[0, 1]`; Label Studio asks for tasks with the lowest score first, so
that low means "an annotation here teaches much". It is not a confidence, and it is comparable only
among the tasks of one model version.

To add a strategy, write a class with this interface in a file beside this one, and name it in
`ml_backend.extensions.STRATEGIES`; or declare it as an entry point of another package. Its
constructor takes `(reference, version)`: the `Reference` of the model version, and its name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from ml_backend.acquisition.reference import Reference
from ml_backend.detection.types import Detections


class Strategy(Protocol):
    """Scores tasks of one model version. Several threads call it at once."""

    def score(
        self, tasks: Sequence[int | None], candidates: Sequence[Detections]
    ) -> Sequence[float]:
        """Computes acquisition scores.

        Args:
            tasks: ids of the tasks, None where Label Studio sent none. A task may come again, and
                must then get the same score as before, nearly.
            candidates: for each task, the detections in its image down to a low confidence, before
                any threshold, with embedding.

        Returns:
            A score in `[0, 1]` for each task, lowest for those to annotate first.
        """
        ...


StrategyFactory = Callable[[Reference, str], Strategy]
"""Makes a strategy from a model version's reference and the version's name."""
