"""Keeps what a model version knows of its training images, to judge other images by."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

from ml_backend.detection.types import FloatArray

_FILE = "acquisition.safetensors"
_MAX_UNCERTAINTY = 4.0
"""Upper end of the scale of uncertainties; practically no image exceeds it."""
Float64Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Reference:
    """Statistics of a model version's own images, which make scores of other images comparable.

    Attributes:
        weights: float64 `[C]`, factor by which an uncertainty about each label counts.
        uncertainties: float64 `[U]`, ascending: `image_uncertainty` of images that the version was
            not trained on.
        embeddings: float32 `[N, D]`, unit length: those of the training images, one of each clip.
    """

    weights: Float64Array
    uncertainties: Float64Array
    embeddings: FloatArray

    @classmethod
    def unknown(cls, labels: int) -> Reference:
        """Makes the reference of a model that was never trained in this project.

        Args:
            labels: number of labels, `C`.
        """
        return cls(np.ones(labels), np.zeros(0), np.zeros((0, 1), np.float32))

    def save(self, folder: Path) -> None:
        """Writes `acquisition.safetensors` into a version's folder; embeddings as float16.

        Raises:
            OSError: the file cannot be written.
        """
        tensors: dict[str, npt.NDArray[np.generic]] = {
            "weights": self.weights,
            "doubts": self.uncertainties,
            "embeddings": self.embeddings.astype(np.float16),
        }
        save_file(tensors, folder / _FILE)

    @classmethod
    def load(cls, folder: Path, labels: int) -> Reference:
        """Reads what `save` wrote; `unknown` where the version's folder has no such file.

        Args:
            folder: the version's folder.
            labels: number of the version's labels.

        Raises:
            OSError, SafetensorError, KeyError: the file is damaged.
        """
        if not (folder / _FILE).is_file():
            return cls.unknown(labels)
        tensors = load_file(folder / _FILE)
        embeddings = tensors["embeddings"].astype(np.float32)
        return cls(tensors["weights"], tensors["doubts"], embeddings)

    def uncertainty_rank(self, uncertainties: Float64Array) -> Float64Array:
        """Ranks uncertainties among those of the reference.

        Args:
            uncertainties: float64 `[M]`.

        Returns:
            float64 `[M]` in `[0, 1]`: fraction of the reference that is less uncertain.
        """
        return fraction_below(uncertainties, self.uncertainties, 0.0, _MAX_UNCERTAINTY)


def fraction_below(
    values: Float64Array, known: npt.NDArray[np.floating], low: float, high: float
) -> Float64Array:
    """Computes the fraction of known values below each value: a smoothed empirical distribution.

    Args:
        values: float64 `[M]`.
        known: `[K]`, ascending; between two of them the fraction is interpolated.
        low: value at which the fraction is 0.
        high: value at which the fraction is 1.

    Returns:
        float64 `[M]` in `[0, 1]`.
    """
    x = np.concatenate([[low], np.clip(known, low, high), [high]])
    fractions: Float64Array = np.interp(values, x, np.linspace(0.0, 1.0, len(x)))
    return fractions
