"""Holds predictions of images by detectors that had not learned them."""

from __future__ import annotations

from dataclasses import dataclass

from ml_backend.detection.training import TrainingResult
from ml_backend.detection.types import Detections, Sample


@dataclass(frozen=True, slots=True)
class Folds:
    """Predictions of images by detectors that had not learned them.

    Attributes:
        parts: keys of the samples of each fold.
        predictions: uncalibrated, by sample key.
        parted: whether images that look alike were divided among folds.
        step_share: share of its steps that each fold took.
    """

    parts: list[frozenset[str]]
    predictions: dict[str, Detections]
    parted: bool
    step_share: float

    @property
    def words(self) -> str:
        """The measured samples in words."""
        words = f"{len(self.parts)} folds over {len(self.predictions)} images"
        if self.parted:
            words += (
                "; most of them look alike, and were learned from as well as measured on: the "
                "figures are optimistic"
            )
        return words


@dataclass(frozen=True, slots=True)
class Measured:
    """A training, and uncalibrated predictions of samples by detectors that had not learned them.

    Attributes:
        result: the training of the version.
        samples: the samples.
        predictions: for each sample.
        words: the samples in words.
        folds: folds, where they measured the version or compare it with the live one.
        by_folds: whether the predictions are those of the folds.
    """

    result: TrainingResult
    samples: tuple[Sample, ...]
    predictions: list[Detections]
    words: str
    folds: Folds | None
    by_folds: bool
