"""What lies in a version's folder, read whole: a version with a damaged part serves nobody."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError

from ml_backend.acquisition.acquisition import Reference
from ml_backend.detection.detector import CorruptDetector, Detector
from ml_backend.detection.types import Detections
from ml_backend.training.out_of_fold import load_out_of_fold


@dataclass(frozen=True, slots=True)
class Artefact:
    """A version, as a training wrote it.

    Attributes:
        detector: what predicts.
        reference: what acquisition scores are made from.
        out_of_fold: what was predicted of images that it has learned by detectors that had not, by
            sample key; empty where a hold-out measured it.
    """

    detector: Detector
    reference: Reference
    out_of_fold: dict[str, Detections]


def load_artefact(folder: Path, device: torch.device) -> Artefact:
    """Reads a version.

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
