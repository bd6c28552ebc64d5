"""Stores out-of-fold predictions: of images by detectors that were not trained on them.

Below 100 images a hold-out is too small to measure on. Each version then keeps, beside its weights,
the predictions of its folds' detectors for the images that those had not seen. They replace its own
predictions wherever it is measured on an image that it has learned.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ml_backend.detection.types import Detections

_FILE = "out_of_fold.json"


def relabel(detections: Detections, old: Sequence[str], new: Sequence[str]) -> Detections:
    """Translates label indices from `old` names to `new`; labels missing there are left out."""
    position = {label: i for i, label in enumerate(new)}
    mapping = np.array([position.get(label, -1) for label in old] or [-1], np.int64)
    labels = mapping[detections.labels]
    return dataclasses.replace(detections, labels=labels).where(labels >= 0)


def save_out_of_fold(
    folder: Path, labels: Sequence[str], predictions: Mapping[str, Detections]
) -> None:
    """Writes out-of-fold predictions beside a version's weights, as JSON."""
    content = {
        "labels": list(labels),
        "predictions": {
            key: {
                "boxes": d.boxes.round(2).tolist(),
                "scores": d.scores.round(4).tolist(),
                "labels": d.labels.tolist(),
            }
            for key, d in predictions.items()
        },
    }
    (folder / _FILE).write_text(json.dumps(content), encoding="utf-8")


def load_out_of_fold(folder: Path, labels: Sequence[str]) -> dict[str, Detections]:
    """Reads out-of-fold predictions, as indices into `labels`; empty where a version has none."""
    path = folder / _FILE
    if not path.is_file():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    return {
        key: relabel(
            Detections(
                np.array(d["boxes"], np.float32).reshape(-1, 4),
                np.array(d["scores"], np.float32),
                np.array(d["labels"], np.int64),
            ),
            content["labels"],
            labels,
        )
        for key, d in content["predictions"].items()
    }
