"""Holds the state of a simulated campaign that runs."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ml_backend.detection.types import Detections
from ml_backend.simulation.results import Round
from ml_backend.training.outcome import Live
from ml_backend.training.split import Item


@dataclass(slots=True)
class Version:
    """The live version, with its predictions and acquisition scores of the unlabelled images."""

    live: Live
    thresholds: dict[float, npt.NDArray[np.float64]]
    found: dict[str, Detections]
    scores: dict[int, float]


@dataclass(slots=True)
class State:
    """The state of a campaign that runs.

    Attributes:
        labelled: indices of the labelled images, in order.
        items: the same images as `split.assign` takes them, by index.
        trained_at: number of labelled images at the last training.
        version: the live version.
        rounds: the trainings until now.
    """

    labelled: list[int] = field(default_factory=list)
    items: dict[int, Item] = field(default_factory=dict)
    trained_at: int = 0
    version: Version | None = None
    rounds: list[Round] = field(default_factory=list)
