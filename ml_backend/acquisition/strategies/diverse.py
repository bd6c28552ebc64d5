"""Asks for uncertain images that differ from the training images and from each other.

Follows PPAL (Yang et al., "Plug and play active learning for object detection", CVPR 2024): weigh
the uncertainty of a box by the difficulty of its label, then ask for images that differ. Unlike
PPAL, it must score one task at a time, as Label Studio opens it, and not a whole pool:

- uncertainty: `image_uncertainty`, ranked among images that the version was not trained on;
- novelty: distance from the nearest training image, by the detector's own backbone;
- crowding: an image that resembles images that were scored before gives way to them, so that the
  hundred most uncertain are not a hundred frames of one clip.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ml_backend.acquisition.image_uncertainty import image_uncertainty
from ml_backend.acquisition.nearest import nearest_similarities, unit_rows
from ml_backend.acquisition.reference import Reference, fraction_below
from ml_backend.acquisition.scored_images import ScoredImages
from ml_backend.detection.types import Detections, FloatArray

NOVELTY = 0.25
"""Share of novelty in the priority; the rest is uncertainty."""
MIN_LOOKALIKE = 0.8
"""Cosine similarity below which two images never count as look-alikes."""
MAX_LOOKALIKE = 0.99
"""Upper limit of the same threshold, which also holds where no training image is known."""


class Diverse:
    """Scores by uncertainty, novelty and crowding.

    Remembers the images that this process has scored. Two processes that score look-alikes each
    have a first one among them.

    Args:
        reference: statistics of the model version's images.
        version: name of the model version; not used.
    """

    def __init__(self, reference: Reference, version: str) -> None:
        self._reference = Reference(
            reference.weights, reference.uncertainties, np.zeros((0, 1), np.float32)
        )
        trained = reference.embeddings
        self._centre = trained.mean(axis=0) if len(trained) else None
        self._trained = self._centred(trained)
        self._nearest = nearest_similarities(self._trained)
        threshold = float(np.quantile(self._nearest, 0.95)) if len(self._nearest) else MAX_LOOKALIKE
        self._scored = ScoredImages(min(max(MIN_LOOKALIKE, threshold), MAX_LOOKALIKE))

    def score(self, tasks: Sequence[int | None], candidates: Sequence[Detections]) -> list[float]:
        """Computes acquisition scores; see `Strategy`."""
        found = np.array([image_uncertainty(c, self._reference.weights) for c in candidates])
        rank = self._reference.uncertainty_rank(found)
        scores = np.zeros(len(candidates))
        # The most uncertain of a group of look-alikes is scored first, and so leads the group.
        for i in np.argsort(-found, kind="stable").tolist():
            priority = (1 - NOVELTY) * rank[i] + NOVELTY * 0.5
            embedding = candidates[i].embedding
            if embedding is not None:
                row = self._centred(embedding[None])[0]
                priority += NOVELTY * (self._novelty(row) - 0.5)
                priority /= 1 + self._scored.crowding(tasks[i], row)
            scores[i] = 1 - priority
        return [float(s) for s in np.clip(scores, 0.0, 1.0)]

    def _novelty(self, row: FloatArray) -> float:
        """Ranks an image's distance from the training images among their own; 0.5 if unknown."""
        if not len(self._trained):
            return 0.5
        nearest = np.array([float((self._trained @ row).max())])
        return 1 - float(fraction_below(nearest, self._nearest, -1.0, 1.0)[0])

    def _centred(self, embeddings: FloatArray) -> FloatArray:
        """Moves embeddings by the mean of the training images, and scales them to unit length."""
        return unit_rows(embeddings if self._centre is None else embeddings - self._centre)
