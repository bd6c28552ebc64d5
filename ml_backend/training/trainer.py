"""What one training learns from a data set, and how it is judged; knows nothing of where that lies.

A live project and a simulated campaign are taught by the same code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ml_backend.acquisition.image_uncertainty import image_uncertainty
from ml_backend.acquisition.label_weights import label_weights
from ml_backend.acquisition.reference import Reference
from ml_backend.detection.calibration import calibrate, fit_calibration
from ml_backend.detection.costs import CostModel, cheapest_thresholds, shown
from ml_backend.detection.detector import Detector
from ml_backend.detection.evaluation import (
    Comparison,
    Evaluation,
    Interval,
    agreement,
    bootstrap_interval,
    compare,
    evaluate,
)
from ml_backend.detection.presets import Preset, preset_named
from ml_backend.detection.training import Progress, TrainingResult, train
from ml_backend.detection.types import Detections, Sample
from ml_backend.settings import Settings
from ml_backend.training.dataset import Dataset
from ml_backend.training.out_of_fold import predict_samples, relabel
from ml_backend.training.promotion import Verdict, judge
from ml_backend.training.split import SMALL, fold_groups, folds

FOLDS = 3
FOLDS_SHARE = 0.5
"""Share of the time budget that the folds take together, where folds decide."""
CALIBRATION_PARTS = 5
"""Parts in which what measures is calibrated, each by the others: where a box lies moves it in the
ranking, and no figure may rest on what was fitted to it."""
WARM_START_FROM = 1000
"""Annotated images from which a training starts from the live version.

Below, it starts from the preset's pretrained weights every time: warm starts generalise worse (Ash
and Adams, 2020), and starting anew costs little while data are few. Where nothing pretrained can be
had it costs what was learned, and the live version is the start at once.
"""


@dataclass(frozen=True, slots=True)
class Live:
    """The live version, to start from and to compare with.

    Attributes:
        name: the version.
        detector: what predicts.
        honest: what was predicted, by detectors that had not seen them, of images that it has
            learned; by sample key, with label indices into `detector.labels`.
    """

    name: str
    detector: Detector
    honest: Mapping[str, Detections]


@dataclass(frozen=True, slots=True)
class Lesson:
    """What a training led to.

    Attributes:
        detector: calibrated, with thresholds.
        result: how the training went.
        measured: the samples that measure.
        predictions: what was found in them by detectors that had not learned them; calibrated.
        out_of_fold: the same by sample key, where folds decided; empty otherwise.
        how: what measured, in words, and what must be known about it.
        evaluation: quality on them.
        interval: of its mean AP50.
        comparison: with the live version, on the same samples; None where nothing is live.
        agreement: how alike what both show on them is, in `[0, 1]`; None likewise.
        verdict: whether it should go live, and why.
        reference: what acquisition scores are made from.
        warm: whether it started from the live version.
    """

    detector: Detector
    result: TrainingResult
    measured: tuple[Sample, ...]
    predictions: list[Detections]
    out_of_fold: dict[str, Detections]
    how: str
    evaluation: Evaluation
    interval: Interval
    comparison: Comparison | None
    agreement: float | None
    verdict: Verdict
    reference: Reference
    warm: bool


@dataclass(frozen=True, slots=True)
class _Measured:
    result: TrainingResult
    samples: tuple[Sample, ...]
    predictions: list[Detections]
    by_folds: bool
    how: str


def cost_model(settings: Settings) -> CostModel:
    """What people's work costs, by the settings."""
    return CostModel(
        look=settings.cost_look,
        draw=settings.cost_draw,
        correct=settings.cost_correct,
        delete=settings.cost_delete,
        relabel=settings.cost_relabel,
    )


class Teacher:
    """Trains a detector on a data set, measures it honestly, and judges it.

    Args:
        settings: budget, preset, weights, costs.
        device: where it trains.
        on_progress: told the fraction done and a sentence; may raise to stop.
    """

    def __init__(
        self,
        settings: Settings,
        device: torch.device,
        on_progress: Callable[[float, str], None],
    ) -> None:
        self._settings = settings
        self._device = device
        self._preset: Preset = preset_named(settings.preset, device)
        self._progress = on_progress

    def teach(self, dataset: Dataset, live: Live | None) -> Lesson:
        """Does it all.

        Args:
            dataset: what to learn, and what only measures.
            live: the version that it must not be worse than.
        """
        labels = dataset.labels
        start = None
        if _holdout_serves(dataset):
            start = self._start(dataset, live)
            measured = self._by_holdout(dataset, start)
        else:
            # Folds begin anew: the live version may have learned what they measure on.
            measured = self._by_folds(dataset)

        self._progress(0.93, "measuring")
        detector = measured.result.detector
        detector.calibration = fit_calibration(measured.predictions, measured.samples, labels)
        predictions = _calibrated(measured, dataset)
        costs = cost_model(self._settings)
        cheapest = cheapest_thresholds(predictions, measured.samples, labels, costs)
        # A label that was never seen gets none: it is never predicted.
        counts = dataset.boxes_by_label()
        detector.thresholds = {label: t for label, t in cheapest.items() if counts[label]}
        evaluation = evaluate(predictions, measured.samples, labels)
        comparison = agrees = None
        if live is not None:
            theirs = self._of_live(live, measured.samples, labels)
            comparison = compare(
                predictions,
                theirs,
                measured.samples,
                labels,
                # It has a threshold for each label that it has learned.
                known=live.detector.thresholds,
                seed=0,
            )
            agrees = agreement(
                [_shown(p, labels, detector.thresholds) for p in predictions],
                [_shown(p, labels, live.detector.thresholds) for p in theirs],
            )
        return Lesson(
            detector=detector,
            result=measured.result,
            measured=measured.samples,
            predictions=predictions,
            out_of_fold={s.key: p for s, p in zip(measured.samples, predictions, strict=True)}
            if measured.by_folds
            else {},
            how=measured.how,
            evaluation=evaluation,
            interval=bootstrap_interval(predictions, measured.samples, labels, seed=0),
            comparison=comparison,
            agreement=agrees,
            verdict=judge(
                evaluation,
                comparison,
                live.name if live is not None else None,
                [
                    label
                    for label in detector.thresholds
                    if live is not None and label not in live.detector.thresholds
                ],
            ),
            reference=self._reference(dataset, detector, predictions, evaluation),
            warm=start is not None,
        )

    def _start(self, dataset: Dataset, live: Live | None) -> Detector | None:
        """The live version, where a training may start from it."""
        if (
            live is None
            or live.detector.preset != self._preset
            # It was measured by folds then, and has learned what measures now.
            or not dataset.holdout.isdisjoint(live.honest)
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
        found = self._predict(result.detector, held)
        words = f"hold-out of {len(held)} images"
        return _Measured(result, held, [found[s.key] for s in held], False, words)

    def _by_folds(self, dataset: Dataset) -> _Measured:
        """Each fold's detector judges the images it has not seen; the version learns from all."""
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
                words=f"fold {number + 1} of {len(parts)}, ",
            )
            found |= self._predict(fold.detector, [by_key[key] for key in sorted(part)])
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
        words: str = "",
    ) -> TrainingResult:
        low, high = span

        def tell(progress: Progress) -> None:
            self._progress(low + (high - low) * progress.fraction, words + progress.message)

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

    def _predict(self, detector: Detector, samples: Sequence[Sample]) -> dict[str, Detections]:
        return predict_samples(detector, samples, max_pixels=self._settings.image_max_pixels)

    def _of_live(
        self, live: Live, samples: Sequence[Sample], labels: tuple[str, ...]
    ) -> list[Detections]:
        unseen = [s for s in samples if s.key not in live.honest]
        found = {**live.honest, **self._predict(live.detector, unseen)}
        return [relabel(found[s.key], live.detector.labels, labels) for s in samples]

    def _reference(
        self,
        dataset: Dataset,
        detector: Detector,
        predictions: Sequence[Detections],
        evaluation: Evaluation,
    ) -> Reference:
        counts = dataset.boxes_by_label()
        ap50 = [evaluation.per_class[label].ap50 for label in dataset.labels]
        weights = label_weights(ap50, [counts[label] for label in dataset.labels])
        # One image of each clip: its frames would make every other look novel.
        firsts = {dataset.clip_of[s.key]: s for s in reversed(dataset.samples)}
        seen = self._predict(detector, list(firsts.values()))
        rows = [d.embedding for d in seen.values() if d.embedding is not None]
        return Reference(
            weights=weights,
            uncertainties=np.sort([image_uncertainty(p, weights) for p in predictions]),
            embeddings=np.stack(rows) if rows else np.zeros((0, 1), np.float32),
        )


def _holdout_serves(dataset: Dataset) -> bool:
    """Whether it is large enough to measure, and leaves enough to learn from."""
    images = len(dataset.samples)
    return images >= SMALL and 0 < len(dataset.holdout) <= images / 2


def _calibrated(measured: _Measured, dataset: Dataset) -> list[Detections]:
    """The predictions, calibrated by what was found in other clips' images."""
    keys = [s.key for s in measured.samples]
    groups, _ = fold_groups(
        {key: dataset.task_of[key] for key in keys}, {key: dataset.clip_of[key] for key in keys}
    )
    parts = folds(groups, min(CALIBRATION_PARTS, len(set(groups.values()))), seed=0)
    found: dict[str, Detections] = {}
    for part in parts:
        others = [i for i, key in enumerate(keys) if key not in part or len(parts) == 1]
        curves = fit_calibration(
            [measured.predictions[i] for i in others],
            [measured.samples[i] for i in others],
            dataset.labels,
        )
        for key, prediction in zip(keys, measured.predictions, strict=True):
            if key in part:
                found[key] = calibrate(prediction, dataset.labels, curves)
    return [found[key] for key in keys]


def threshold_of(labels: Sequence[str], thresholds: Mapping[str, float]) -> npt.NDArray[np.float64]:
    """float64 `[C]`: the threshold of each label; above any confidence where it has none."""
    return np.array([thresholds.get(label, np.inf) for label in labels])


def _shown(found: Detections, labels: Sequence[str], thresholds: Mapping[str, float]) -> Detections:
    return shown(found, threshold_of(labels, thresholds)[found.labels])
