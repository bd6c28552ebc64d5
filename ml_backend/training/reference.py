"""Makes the data that acquisition scores of a new version are computed from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ml_backend.acquisition.image_uncertainty import image_uncertainty
from ml_backend.acquisition.label_weights import label_weights
from ml_backend.acquisition.reference import Reference
from ml_backend.detection.assessment import Assessment
from ml_backend.detection.types import FloatArray, Sample
from ml_backend.training.dataset import Dataset


def reference_of(
    dataset: Dataset, assessment: Assessment, embeddings: Sequence[FloatArray]
) -> Reference:
    """Makes the reference of a version.

    Args:
        dataset: the annotated images.
        assessment: of the version.
        embeddings: float32 `[D]` each, unit length, of the images that `firsts` lists.
    """
    counts = dataset.boxes_by_label()
    ap50 = [assessment.evaluation.per_class[label].ap50 for label in dataset.labels]
    weights = label_weights(ap50, [counts[label] for label in dataset.labels])
    return Reference(
        weights=weights,
        uncertainties=np.sort([image_uncertainty(p, weights) for p in assessment.predictions]),
        embeddings=np.stack(embeddings) if embeddings else np.zeros((0, 1), np.float32),
    )


def firsts(dataset: Dataset, samples: Sequence[Sample]) -> list[Sample]:
    """Selects one image of each clip: its frames would make every other image look novel."""
    return list({dataset.clip_of[s.key]: s for s in reversed(samples)}.values())
