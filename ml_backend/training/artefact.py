"""Reads the files of a model version. A version with one damaged file cannot be used at all."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError

from ml_backend.acquisition.reference import Reference
from ml_backend.detection.detector import CorruptDetector, Detector
from ml_backend.detection.types import Detections
from ml_backend.training.out_of_fold import load_out_of_fold


@dataclass(frozen=True, slots=True)
class Artefact:
    """A model version, as its training wrote it.

    Attributes:
        detector: the detector.
        reference: statistics of the training images, for acquisition scores.
        out_of_fold: predictions on the training images, by sample key, each by a detector that was
            not trained on the image; empty where a hold-out measured the version.
    """

    detector: Detector
    reference: Reference
    out_of_fold: dict[str, Detections]


def load_artefact(folder: Path, device: torch.device) -> Artefact:
    """Reads a model version from its folder.

    Args:
        folder: the version's folder.
        device: receives the detector.

    Raises:
        CorruptDetector: a file is missing or damaged; the text names the folder.
    """
    detector = Detector.load(folder, device)
    try:
        return Artefact(
            detector,
            Reference.load(folder, len(detector.labels)),
            load_out_of_fold(folder, detector.labels),
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError) as error:
        raise CorruptDetector(f"{folder} holds a damaged version: {error}") from error
