"""Predictions that measure: never by a detector on an image that it was trained on.

Below 100 images there is no hold-out worth the name. Each version then keeps, beside its weights,
what the detectors of its folds said of the images that they had not seen. Those stand in for it
wherever it is measured on an image that it has learned.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from ml_backend.detection.decoding import decode_image
from ml_backend.detection.detector import Detector
from ml_backend.detection.types import Detections, Sample

_FILE = "out_of_fold.json"


def predict_samples(
    detector: Detector,
    samples: Sequence[Sample],
    *,
    max_pixels: int,
    on_progress: Callable[[float], None] | None = None,
) -> dict[str, Detections]:
    """What a detector finds in the samples' images, by key."""
    found: dict[str, Detections] = {}
    size = detector.preset.predict_batch
    for start in range(0, len(samples), size):
        batch = samples[start : start + size]
        images = [decode_image(s.image, max_pixels=max_pixels) for s in batch]
        for sample, detections in zip(batch, detector.predict(images), strict=True):
            found[sample.key] = detections
        if on_progress is not None:
            on_progress(min(1.0, (start + size) / len(samples)))
    return found


def relabel(detections: Detections, old: Sequence[str], new: Sequence[str]) -> Detections:
    """The detections with indices into `new` instead of `old`; labels it lacks are left out."""
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
    """Reads them back, with label indices into `labels`; empty where the version has none."""
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
