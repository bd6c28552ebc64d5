"""Chooses images that differ most from each other."""

from __future__ import annotations

import numpy as np

from ml_backend.detection.types import FloatArray


def farthest_first(embeddings: FloatArray, count: int) -> list[int]:
    """Chooses the images that differ most, for a project without a detector.

    Farthest-first traversal (Gonzalez, 1985; as "k-center greedy" in Sener and Savarese, "Active
    learning for convolutional neural networks: a core-set approach", ICLR 2018). The first image is
    the one nearest to the mean.

    Args:
        embeddings: float32 `[N, D]`.
        count: number of images wanted; all of them where there are fewer.

    Returns:
        Indices, in the order in which the images should be annotated.
    """
    if not len(embeddings):
        return []
    moved = embeddings - embeddings.mean(axis=0)
    rows = moved / np.maximum(np.linalg.norm(moved, axis=1, keepdims=True), 1e-9)
    chosen = [int(np.argmin(np.linalg.norm(moved, axis=1)))]
    distance = 1 - rows @ rows[chosen[0]]
    while len(chosen) < min(count, len(rows)):
        distance[chosen] = -1.0
        chosen.append(int(distance.argmax()))
        distance = np.minimum(distance, 1 - rows @ rows[chosen[-1]])
    return chosen
