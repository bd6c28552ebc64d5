"""Trains a version on a data set and judges it; knows nothing of where the data set lies.

Live projects and simulated campaigns are trained by the same code.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ml_backend.acquisition.image_uncertainty import image_uncertainty
from ml_backend.acquisition.label_weights import label_weights
from ml_backend.acquisition.reference import Reference
from ml_backend.detection.assessment import Assessment, assess
from ml_backend.detection.costs import CostModel
from ml_backend.detection.detector import Detector
from ml_backend.detection.evaluation import Comparison
from ml_backend.detection.prediction import predict_samples
from ml_backend.detection.presets import Preset, preset_named
from ml_backend.detection.training import Progress, TrainingResult, train
from ml_backend.detection.types import Detections, Sample
from ml_backend.reasons import Code, Reason, reason
from ml_backend.settings import Settings
from ml_backend.training.dataset import Dataset
from ml_backend.training.out_of_fold import relabel
from ml_backend.training.promotion import Verdict, judge
from ml_backend.training.split import SMALL, fold_groups, folds

FOLDS = 3
FOLDS_SHARE = 0.5
"""Share of the time budget that the folds take together, where folds decide."""
CALIBRATION_PARTS = 5
"""Parts of the measured images, each of which is calibrated by the others."""
WARM_START_FROM = 1000
"""Annotated images from which a training starts from the live version.

Below, it starts from the preset's pretrained weights every time: warm starts generalise worse (Ash
and Adams, 2020), and starting anew costs little while data are few. Without pretrained weights,
starting anew would lose everything learned, so every training starts from the live version.
"""


@dataclass(frozen=True, slots=True)
class Live:
    """The live version, to start from and to compare with.

    Attributes:
        name: the version.
        detector: its detector.
        out_of_fold: predictions of images that it has learned, by detectors that had not, by
            sample key; with label indices into `detector.labels`.
    """

    name: str
    detector: Detector
    out_of_fold: Mapping[str, Detections]


@dataclass(frozen=True, slots=True)
class TrainingOutcome:
    """A trained version with its measurements.

    Attributes:
        detector: calibrated, with thresholds.
        result: the course of the training.
        assessment: its quality on samples that it has not learned.
        out_of_fold: calibrated predictions by sample key, where folds measured; empty otherwise.
        measured_on: the samples that measured, in words, and what must be known about them.
        comparison: with the live version, on the same samples; None where nothing is live.
        agreement: how alike the boxes are that both show, in `[0, 1]`; None likewise.
        verdict: whether it should go live, and why.
        reference: the data that acquisition scores are made from.
        warm: whether it started from the live version.
    """

    detector: Detector
    result: TrainingResult
    assessment: Assessment
    out_of_fold: dict[str, Detections]
    measured_on: str
    comparison: Comparison | None
    agreement: float | None
    verdict: Verdict
    reference: Reference
    warm: bool


@dataclass(frozen=True, slots=True)
class _Measured:
    """A training, and uncalibrated predictions of samples by detectors that had not learned them.

    Attributes:
        result: the training of the version.
        samples: the samples.
        predictions: for each sample.
        by_folds: whether folds made them.
        words: the samples in words.
    """

    result: TrainingResult
    samples: tuple[Sample, ...]
    predictions: list[Detections]
    by_folds: bool
    words: str


def cost_model(settings: Settings) -> CostModel:
    """Makes the cost model of the settings."""
    return CostModel(
        look=settings.cost_look,
        draw=settings.cost_draw,
        correct=settings.cost_correct,
        delete=settings.cost_delete,
        relabel=settings.cost_relabel,
    )


class Trainer:
    """Trains a detector on a data set, measures it on images not learned, and judges it.

    Args:
        settings: budget, preset, weights, costs.
        device: where it trains.
        on_progress: told the fraction done and the present stage; may raise to stop.
    """

    def __init__(
        self,
        settings: Settings,
        device: torch.device,
        on_progress: Callable[[float, Reason], None],
    ) -> None:
        self._settings = settings
        self._device = device
        self._preset: Preset = preset_named(settings.preset, device)
        self._progress = on_progress

    def fit(self, dataset: Dataset, live: Live | None) -> TrainingOutcome:
        """Trains, measures and judges a version.

        Args:
            dataset: the samples to learn from, and those that only measure.
            live: the version that the new one must not be worse than.
        """
        start = None
        if _holdout_serves(dataset):
            start = self._start(dataset, live)
            measured = self._by_holdout(dataset, start)
        else:
            # Folds begin anew: the live version may have learned what they measure on.
            measured = self._by_folds(dataset)

        self._progress(0.93, reason(Code.MEASURING, stage="calibration"))
        detector = measured.result.detector
        counts = dataset.boxes_by_label()
        assessment = assess(
            measured.predictions,
            measured.samples,
            dataset.labels,
            parts=_calibration_parts(measured.samples, dataset),
            # A label that was never seen is never shown.
            learned=[label for label in dataset.labels if counts[label]],
            costs=cost_model(self._settings),
        )
        detector.calibration = assessment.calibration
        detector.thresholds = assessment.thresholds
        comparison = agreement = None
        gained: list[str] = []
        if live is not None:
            theirs = self._of_live(live, measured.samples, dataset.labels)
            self._progress(0.96, reason(Code.MEASURING, stage="comparison"))
            # The live version has a threshold for each label that it has learned.
            comparison, agreement = assessment.compare(theirs, live.detector.thresholds)
            gained = [x for x in assessment.thresholds if x not in live.detector.thresholds]
        pairs = zip(measured.samples, assessment.predictions, strict=True)
        return TrainingOutcome(
            detector=detector,
            result=measured.result,
            assessment=assessment,
            out_of_fold={s.key: p for s, p in pairs} if measured.by_folds else {},
            measured_on=measured.words,
            comparison=comparison,
            agreement=agreement,
            verdict=judge(
                assessment.evaluation, comparison, live.name if live is not None else None, gained
            ),
            reference=self._reference(dataset, detector, assessment),
            warm=start is not None,
        )

    def _start(self, dataset: Dataset, live: Live | None) -> Detector | None:
        """Answers the detector of the live version, where a training may start from it."""
        if (
            live is None
            or live.detector.preset != self._preset
            # It was measured by folds then, and has learned images of today's hold-out.
            or not dataset.holdout.isdisjoint(live.out_of_fold)
        ):
            return None
        if len(dataset.samples) < WARM_START_FROM:
            anew = Detector.pretrained(
                self._preset, dataset.labels, self._settings.weights, self._device
            )
            if anew.weights.kind != "none":
                return None
        return live.detector

    def _by_holdout(self, dataset: Dataset, start: Detector | None) -> _Measured:
        learned = [s for s in dataset.samples if s.key not in dataset.holdout]
        held = tuple(s for s in dataset.samples if s.key in dataset.holdout)
        result = self._train(
            dataset.labels,
            learned,
            start,
            validation=held,
            budget=self._settings.train_budget,
            span=(0.1, 0.9),
        )
        found = self._predict(result.detector, held, {"stage": "holdout"}, (0.9, 0.93))
        words = f"hold-out of {len(held)} images"
        return _Measured(result, held, [found[s.key] for s in held], False, words)

    def _by_folds(self, dataset: Dataset) -> _Measured:
        """Measures each fold by a detector trained on the others, and trains one on all images."""
        by_key = {s.key: s for s in dataset.samples}
        groups, parted = fold_groups(dataset.task_of, dataset.clip_of)
        parts = folds(groups, min(FOLDS, len(set(groups.values()))), seed=0)
        budget = self._settings.train_budget
        found: dict[str, Detections] = {}
        for number, part in enumerate(parts):
            begin = 0.1 + 0.4 * number / len(parts)
            fold = self._train(
                dataset.labels,
                [s for s in dataset.samples if s.key not in part],
                None,
                validation=(),
                budget=budget * FOLDS_SHARE / len(parts),
                span=(begin, begin + 0.4 / len(parts)),
                seed=number,
                fold={"fold": number + 1, "folds": len(parts)},
            )
            found |= self._predict(
                fold.detector,
                [by_key[key] for key in sorted(part)],
                {"stage": "fold", "fold": number + 1, "folds": len(parts)},
                (begin + 0.4 / len(parts),) * 2,
            )
        result = self._train(
            dataset.labels,
            list(dataset.samples),
            None,
            validation=(),
            budget=budget * (1 - FOLDS_SHARE),
            span=(0.5, 0.9),
        )
        measured = tuple(s for s in dataset.samples if s.key in found)
        words = f"{len(parts)} folds over {len(measured)} images"
        if parted:
            words += (
                "; most of them look alike, and were learned from as well as measured on: the "
                "figures are optimistic"
            )
        return _Measured(result, measured, [found[s.key] for s in measured], True, words)

    def _train(
        self,
        labels: tuple[str, ...],
        samples: Sequence[Sample],
        start: Detector | None,
        *,
        validation: Sequence[Sample],
        budget: float,
        span: tuple[float, float],
        seed: int = 0,
        fold: Mapping[str, int] | None = None,
    ) -> TrainingResult:
        low, high = span

        def tell(progress: Progress) -> None:
            stage = Reason(progress.stage.code, {**progress.stage.values, **(fold or {})})
            self._progress(low + (high - low) * progress.fraction, stage)

        return train(
            self._preset,
            labels,
            samples,
            validation=validation,
            start=start,
            weights=self._settings.weights,
            device=self._device,
            seed=seed,
            budget_seconds=budget,
            threads=self._settings.training_threads,
            max_pixels=self._settings.image_max_pixels,
            on_progress=tell,
        )

    def _predict(
        self,
        detector: Detector,
        samples: Sequence[Sample],
        stage: Mapping[str, object],
        span: tuple[float, float],
    ) -> dict[str, Detections]:
        low, high = span

        def tell(fraction: float) -> None:
            self._progress(
                low + (high - low) * fraction, reason(Code.MEASURING, **stage, share=fraction)
            )

        return predict_samples(
            detector, samples, max_pixels=self._settings.image_max_pixels, on_progress=tell
        )

    def _of_live(
        self, live: Live, samples: Sequence[Sample], labels: tuple[str, ...]
    ) -> list[Detections]:
        """Answers the live version's predictions of samples: out of fold where it learned them."""
        unseen = [s for s in samples if s.key not in live.out_of_fold]
        found = {
            **live.out_of_fold,
            **self._predict(live.detector, unseen, {"stage": "live"}, (0.93, 0.96)),
        }
        return [relabel(found[s.key], live.detector.labels, labels) for s in samples]

    def _reference(self, dataset: Dataset, detector: Detector, assessment: Assessment) -> Reference:
        counts = dataset.boxes_by_label()
        ap50 = [assessment.evaluation.per_class[label].ap50 for label in dataset.labels]
        weights = label_weights(ap50, [counts[label] for label in dataset.labels])
        # One image of each clip: its frames would make every other look novel.
        firsts = {dataset.clip_of[s.key]: s for s in reversed(dataset.samples)}
        stage = {"stage": "embedding"}
        seen = self._predict(detector, list(firsts.values()), stage, (0.97, 1.0))
        rows = [d.embedding for d in seen.values() if d.embedding is not None]
        return Reference(
            weights=weights,
            uncertainties=np.sort([image_uncertainty(p, weights) for p in assessment.predictions]),
            embeddings=np.stack(rows) if rows else np.zeros((0, 1), np.float32),
        )


def _holdout_serves(dataset: Dataset) -> bool:
    """Tells whether the hold-out is large enough to measure, and leaves enough to learn from."""
    images = len(dataset.samples)
    return images >= SMALL and 0 < len(dataset.holdout) <= images / 2


def _calibration_parts(samples: Sequence[Sample], dataset: Dataset) -> Sequence[Collection[str]]:
    """Divides samples so that the images of a clip share a part."""
    keys = [s.key for s in samples]
    groups, _ = fold_groups(
        {key: dataset.task_of[key] for key in keys}, {key: dataset.clip_of[key] for key in keys}
    )
    return folds(groups, min(CALIBRATION_PARTS, len(set(groups.values()))), seed=0)
