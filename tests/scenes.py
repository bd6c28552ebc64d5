"""Make boxes, and detections of them as a mediocre detector would find them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ml_backend.detection.types import Detections, Sample

LABELS = ("car", "person", "valve", "never")


def scene(seed: int, images: int, *, noise: float = 6.0) -> tuple[list[Detections], list[Sample]]:
    """Make images with boxes, and detections: moved, missed, doubled, invented, of a wrong class.

    Args:
        seed: of the random numbers.
        images: number of images.
        noise: standard deviation of a detection's corners, in pixels.

    Returns:
        The detections and the samples, one of each for an image; boxes are float32 `[N, 4]`,
        `x1, y1, x2, y2` in pixels.
    """
    random = np.random.default_rng(seed)
    found, truth = [], []
    for number in range(images):
        count = int(random.integers(0, 8))
        corner = random.uniform(0, 300, (count, 2))
        boxes = np.concatenate([corner, corner + random.uniform(15, 120, (count, 2))], 1)
        labels = random.integers(0, 3, count)
        keep = random.random(count) < 0.8
        twice = random.random(count) < 0.2
        moved = np.concatenate([boxes[keep], boxes[twice]])
        moved = moved + random.normal(0, noise, moved.shape)
        names = np.concatenate([labels[keep], labels[twice]])
        wrong = random.random(len(names)) < 0.1
        names[wrong] = random.integers(0, 4, int(wrong.sum()))
        invented = random.uniform(0, 300, (int(random.integers(0, 4)), 2))
        moved = np.concatenate([moved, np.concatenate([invented, invented + 40], 1)])
        names = np.concatenate([names, random.integers(0, 4, len(invented))])
        good = (moved[:, 2:] > moved[:, :2]).all(1)
        scores = random.permutation(len(moved)) / max(1, len(moved)) * 0.9 + 0.05
        found.append(
            Detections(
                moved[good].astype(np.float32),
                scores[good].astype(np.float32),
                names[good].astype(np.int64),
            )
        )
        truth.append(
            Sample(str(number), Path("x"), boxes.astype(np.float32), labels.astype(np.int64))
        )
    return found, truth
