"""Fits a live head: a version of its own kind, seconds after each of the first annotations.

A live head is a frozen pretrained trunk with a small head that `cells_fit` fits to the annotated
images. It serves until a trained version is better, and every training is compared with it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ml_backend.detection.architectures.base import LoadedWeights, Target
from ml_backend.detection.architectures.cells import STRIDE, CellNet, decoded
from ml_backend.detection.architectures.cells_fit import View, fit_head, view_of
from ml_backend.detection.assessment import assess
from ml_backend.detection.costs import NEVER, without_costly
from ml_backend.detection.decoding import UndecodableImage
from ml_backend.detection.detector import FLOOR, Detector
from ml_backend.detection.embedding import projected
from ml_backend.detection.presets.live_head import PRESET
from ml_backend.detection.thread_parallel import threads_inside
from ml_backend.detection.training import TrainingResult
from ml_backend.detection.types import Detections, FloatArray, Sample
from ml_backend.jobs.outcomes import Refused
from ml_backend.reasons import Code, Reason, reason
from ml_backend.settings import Settings
from ml_backend.training.dataset import Dataset
from ml_backend.training.features import FeatureCache, Features
from ml_backend.training.outcome import Live, TrainingOutcome, cost_model, predictions_of_live
from ml_backend.training.promotion import Verdict, judge
from ml_backend.training.reference import firsts, reference_of
from ml_backend.training.split import fold_groups, folds

_log = logging.getLogger(__name__)

MOST_IMAGES = 60
"""Images that a live head is fitted to; more would add less than a training by then."""
FEW_IMAGES = 6
"""Images up to which each is predicted by a head that was fitted to all others."""
FOLDS = 4
"""Parts in which more images are predicted, each by a head fitted to the other parts."""


@dataclass(frozen=True, slots=True)
class _Image:
    """An annotated image, ready to be fitted to and to be predicted."""

    sample: Sample
    features: Features
    views: tuple[View, View]


class LiveHead:
    """Fits a live head to a data set, and measures it on images that it was not fitted to.

    Args:
        settings: weights, threads, costs.
        device: where its versions predict; it is fitted on the CPU.
        on_progress: told the fraction done and the present stage; may raise to stop.
        folder: keeps the features of images; None keeps nothing.
    """

    def __init__(
        self,
        settings: Settings,
        device: torch.device,
        on_progress: Callable[[float, Reason], None],
        folder: Path | None = None,
    ) -> None:
        self._settings = settings
        self._device = device
        self._progress = on_progress
        self._folder = folder

    def fit(self, dataset: Dataset, live: Live | None) -> TrainingOutcome:
        """Fits and measures a head.

        Args:
            dataset: all annotated images.
            live: the version that is live: an earlier head, if any.

        Raises:
            Refused: fewer than two images can be read.
        """
        began = time.monotonic()
        with threads_inside(self._settings.training_threads):
            module, loaded, cache = self._opened(dataset.labels)
            images = self._read(dataset, cache)
            cache.forget_others()
            if len(images) < 2:
                raise Refused(reason(Code.TOO_FEW_IMAGES, images=len(images)))
            parts = _parts([i.sample for i in images], dataset)
            found = self._out_of_fold(module, images, parts)
            fit_head(module, [view for image in images for view in image.views])
        detector = Detector(PRESET, dataset.labels, module, loaded, self._device)
        seconds = time.monotonic() - began
        samples = tuple(image.sample for image in images)
        counts = dataset.boxes_by_label()
        assessment = assess(
            [found[s.key] for s in samples],
            samples,
            dataset.labels,
            parts=parts,
            learned=[label for label in dataset.labels if counts[label]],
            costs=cost_model(self._settings),
        )
        detector.calibration = assessment.calibration
        thresholds = without_costly(
            assessment.predictions,
            samples,
            dataset.labels,
            assessment.thresholds,
            cost_model(self._settings),
        )
        detector.thresholds = thresholds
        comparison = agreement = None
        if live is not None:
            theirs = predictions_of_live(
                live, samples, dataset.labels, max_pixels=self._settings.image_max_pixels
            )
            comparison, agreement = assessment.compare(theirs, live.detector.thresholds)
        verdict = judge(
            assessment.evaluation,
            comparison,
            live.name if live is not None else None,
            needed=0.0,
        )
        if verdict.promote:
            withheld = [label for label, threshold in thresholds.items() if threshold >= NEVER]
            verdict = Verdict(
                True,
                reason(
                    Code.LIVE_HEAD_FITTED,
                    images=len(images),
                    ap50=assessment.evaluation.map50,
                    withheld=withheld,
                ),
            )
        return TrainingOutcome(
            detector=detector,
            result=TrainingResult(detector, 0.0, 0, 0, seconds, 0, "finished"),
            assessment=assessment,
            out_of_fold={s.key: p for s, p in zip(samples, assessment.predictions, strict=True)},
            measured_on=f"{len(parts)} parts of {len(samples)} images, each unseen by its head",
            comparison=comparison,
            agreement=agreement,
            verdict=verdict,
            reference=reference_of(dataset, assessment, _embeddings(dataset, images)),
            warm=False,
        )

    def predict_unseen(
        self, dataset: Dataset, parts: Sequence[Collection[str]]
    ) -> dict[str, Detections]:
        """Predicts images of a data set by heads that were not fitted to them.

        Args:
            dataset: the images.
            parts: keys of the images that are predicted together, by a head fitted to the others.

        Returns:
            Uncalibrated detections by sample key; of images that cannot be read, none.
        """
        with threads_inside(self._settings.training_threads):
            module, _, cache = self._opened(dataset.labels)
            return self._out_of_fold(module, self._read(dataset, cache, most=None), parts)

    def _opened(self, labels: Sequence[str]) -> tuple[CellNet, LoadedWeights, FeatureCache]:
        """Makes the network with its pretrained trunk, and the cache of what it computes."""
        module, loaded = PRESET.architecture.pretrained(labels, "auto")
        assert isinstance(module, CellNet)
        cache = FeatureCache(
            self._folder,
            PRESET,
            loaded.detail,
            module.eval(),
            max_pixels=self._settings.image_max_pixels,
        )
        return module, loaded, cache

    def _read(
        self, dataset: Dataset, cache: FeatureCache, most: int | None = MOST_IMAGES
    ) -> list[_Image]:
        """Reads the features of the images; leaves out those that cannot be read."""
        samples = list(dataset.samples)
        if most is not None and len(samples) > most:
            chosen = np.linspace(0, len(samples) - 1, most).round().astype(int)
            samples = [samples[i] for i in chosen]
        images = []
        for number, sample in enumerate(samples):
            why = reason(Code.READING_IMAGES, done=number, total=len(samples))
            self._progress(0.1 + 0.5 * number / len(samples), why)
            try:
                features = cache.of(sample)
            except (UndecodableImage, OSError) as error:
                # `build_dataset` decoded it a moment ago: the disk fails, or it was removed.
                _log.warning("%s is left out of the live head: %s", sample.key, error)
                continue
            images.append(_image(sample, features))
        return images

    def _out_of_fold(
        self, module: CellNet, images: Sequence[_Image], parts: Sequence[Collection[str]]
    ) -> dict[str, Detections]:
        found: dict[str, Detections] = {}
        for number, part in enumerate(parts):
            stage = {"stage": "fold", "fold": number + 1, "folds": len(parts)}
            self._progress(0.6 + 0.3 * number / len(parts), reason(Code.MEASURING, **stage))
            others = [view for i in images if i.sample.key not in part for view in i.views]
            if not others:
                continue
            fit_head(module, others)
            for image in images:
                if image.sample.key in part:
                    found[image.sample.key] = _predicted(module, image.features)
        return found


def _image(sample: Sample, features: Features) -> _Image:
    height, width = (side * STRIDE for side in features.plain[0].shape[-2:])
    scale = torch.tensor([width / features.size[0], height / features.size[1]] * 2)
    boxes = torch.from_numpy(sample.boxes) * scale
    x1, y1, x2, y2 = boxes.unbind(1)
    mirrored = torch.stack([width - x2, y1, width - x1, y2], dim=1)
    labels = torch.from_numpy(sample.labels)
    views = (
        view_of(features.plain, Target(boxes, labels)),
        view_of(features.mirrored, Target(mirrored, labels)),
    )
    return _Image(sample, features, views)


def _predicted(module: CellNet, features: Features) -> Detections:
    with torch.no_grad():
        logits, distances = module.head(features.plain)
        boxes, scores, labels = decoded(logits[0], distances[0])
    height, width = (side * STRIDE for side in features.plain[0].shape[-2:])
    scale = torch.tensor([features.size[0] / width, features.size[1] / height] * 2)
    found = Detections(
        (boxes * scale).numpy(),
        scores.numpy(),
        labels.numpy(),
        size=features.size,
    )
    return found.where(found.scores >= FLOOR).ranked()


def _parts(samples: Sequence[Sample], dataset: Dataset) -> list[frozenset[str]]:
    """Divides images so that those of a clip share a part; few images are parts of their own."""
    keys = [s.key for s in samples]
    groups, _ = fold_groups(
        {key: dataset.task_of[key] for key in keys}, {key: dataset.clip_of[key] for key in keys}
    )
    count = len(set(groups.values()))
    return folds(groups, count if count <= FEW_IMAGES else FOLDS, seed=0)


def _embeddings(dataset: Dataset, images: Sequence[_Image]) -> list[FloatArray]:
    of_key = {image.sample.key: image.features for image in images}
    chosen = firsts(dataset, [image.sample for image in images])
    return list(projected(torch.cat([of_key[s.key].plain[-1].mean(dim=(2, 3)) for s in chosen])))
