"""Predicts the images of many samples, while others are being read."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch

from ml_backend.detection.detector import Detector
from ml_backend.detection.loading import (
    CachedImages,
    loading_workers,
    prediction_batches,
    read_prepared,
)
from ml_backend.detection.types import Detections, Sample


def predict_samples(
    detector: Detector,
    samples: Sequence[Sample],
    *,
    max_pixels: int,
    on_progress: Callable[[float], None] | None = None,
) -> dict[str, Detections]:
    """Finds boxes in the images of samples.

    Args:
        detector: the detector.
        samples: whose images.
        max_pixels: larger images are refused.
        on_progress: told the fraction done after each batch; may raise to stop.

    Returns:
        Detections by sample key, in pixels of the sample's boxes.

    Raises:
        UndecodableImage, OSError: an image cannot be read.
    """
    read = functools.partial(read_prepared, preset=detector.preset, max_pixels=max_pixels)
    images = CachedImages(samples, read, capacity=0)
    workers = loading_workers(detector.device, torch.get_num_threads())
    found: list[Detections] = []
    size = detector.preset.predict_batch
    for batch in prediction_batches(images, size=size, workers=workers):
        found += detector.predict(batch)
        if on_progress is not None:
            on_progress(len(found) / len(images))
    return {sample.key: one for sample, one in zip(samples, found, strict=True)}
