"""Boxes, and detections of them, as a detector of some quality would make them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ml_backend.detection.types import Detections, Sample

LABELS = ("car", "person", "valve", "never")


def scene(seed: int, images: int, *, noise: float = 6.0) -> tuple[list[Detections], list[Sample]]:
    """Boxes, and detections of them: moved, missed, doubled, invented, of the wrong class."""
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
