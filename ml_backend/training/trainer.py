"""Trains a version on a data set and judges it; knows nothing of where the data set lies.

Live projects and simulated campaigns are trained by the same code.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import torch

from ml_backend.acquisition.reference import Reference
from ml_backend.detection.assessment import Assessment, assess, calibrated_across
from ml_backend.detection.detector import Detector
from ml_backend.detection.evaluation import Comparison, compare
from ml_backend.detection.prediction import predict_samples
from ml_backend.detection.presets import Preset, preset_named
from ml_backend.detection.presets.live_head import PRESET as LIVE_HEAD
from ml_backend.detection.schedule import steps_for
from ml_backend.detection.training import Progress, TrainingResult, train
from ml_backend.detection.types import Detections, Sample
from ml_backend.reasons import Code, Reason, reason
from ml_backend.settings import Settings
from ml_backend.training.dataset import Dataset
from ml_backend.training.live_head import LiveHead
from ml_backend.training.measured import Folds, Measured
from ml_backend.training.outcome import Live, TrainingOutcome, cost_model, predictions_of_live
from ml_backend.training.promotion import judge
from ml_backend.training.reference import firsts, reference_of
from ml_backend.training.split import SMALL, fold_groups, folds

FOLDS = 3
FEW_IMAGES = 20
"""Images up to which two folds do: a third would take the time that the first version waits for."""
CALIBRATION_PARTS = 5
"""Parts of the measured images, each of which is calibrated by the others."""
WARM_START_FROM = 1000
"""Annotated images from which a training starts from the live version.

Below, it starts from the preset's pretrained weights every time: warm starts generalise worse (Ash
and Adams, 2020), and starting anew costs little while data are few. Without pretrained weights,
starting anew would lose everything learned, so every training starts from the live version.
"""
_SPARE = 1.5
"""A training whose steps were reduced to fit the budget may take so many times its share of it:
the load of the machine changes, and must not weaken one fold more than another."""


class Trainer:
    """Trains a detector on a data set, measures it on images not learned, and judges it.

    Args:
        settings: budget, preset, weights, costs.
        device: where it trains.
        on_progress: told the fraction done and the present stage; may raise to stop.
        features: keeps the features of images for the live head; None keeps nothing.

    Attributes:
        preset: of the detectors that it trains.
    """

    def __init__(
        self,
        settings: Settings,
        device: torch.device,
        on_progress: Callable[[float, Reason], None],
        features: Path | None = None,
    ) -> None:
        self._settings = settings
        self._device = device
        self.preset: Preset = preset_named(settings.preset, device)
        self._progress = on_progress
        self._features = features

    def fit(self, dataset: Dataset, live: Live | None, best: Live | None = None) -> TrainingOutcome:
        """Trains, measures and judges a version.

        Args:
            dataset: the samples to learn from, and those that only measure.
            live: the version that the new one must not be worse than.
            best: the best version that a hold-out has measured, where it is not live.
        """
        start = None
        if _holdout_serves(dataset):
            start = self._start(dataset, live)
            measured = self._by_holdout(dataset, start, live)
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
        live_head = self._against_live_head(measured, dataset)
        comparison = agreement = None
        gained: list[str] = []
        if live is not None:
            theirs = self._of_live(live, measured.samples, dataset.labels)
            self._progress(0.96, reason(Code.MEASURING, stage="comparison"))
            # The live version has a threshold for each label that it has learned.
            comparison, agreement = assessment.compare(theirs, live.detector.thresholds)
            if live.is_live_head:
                # It was fitted to more images than a fold is trained on.
                comparison = live_head or comparison
            else:
                comparison = self._alike(measured, dataset, live) or comparison
            gained = [x for x in assessment.thresholds if x not in live.detector.thresholds]
        behind_best = None
        if best is not None and not measured.by_folds:
            theirs = self._of_live(best, measured.samples, dataset.labels)
            behind_best, _ = assessment.compare(theirs, best.detector.thresholds)
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
                assessment.evaluation,
                comparison,
                live.name if live is not None else None,
                gained,
                same_recipe=live is None or live.detector.preset in (self.preset, LIVE_HEAD),
                live_head=live_head,
                best=None if best is None or behind_best is None else (best.name, behind_best),
            ),
            reference=self._reference(dataset, detector, assessment),
            warm=start is not None,
            behind_best=behind_best,
            step_share=measured.folds.step_share if measured.folds is not None else 1.0,
        )

    def _start(self, dataset: Dataset, live: Live | None) -> Detector | None:
        """Answers the detector of the live version, where a training may start from it."""
        if (
            live is None
            or live.detector.preset != self.preset
            # It was measured by folds then, and has learned images of today's hold-out.
            or not dataset.holdout.isdisjoint(live.out_of_fold)
        ):
            return None
        if len(dataset.samples) < WARM_START_FROM:
            anew = Detector.pretrained(
                self.preset, dataset.labels, self._settings.weights, self._device
            )
            if anew.weights.kind != "none":
                return None
        return live.detector

    def _by_holdout(self, dataset: Dataset, start: Detector | None, live: Live | None) -> Measured:
        learned = [s for s in dataset.samples if s.key not in dataset.holdout]
        held = tuple(s for s in dataset.samples if s.key in dataset.holdout)
        by_folds, budget, low = None, self._settings.train_budget, 0.1
        if live is not None and not live.is_live_head and live.out_of_fold:
            # The live version has learned images of the hold-out: folds compare with its folds.
            by_folds = self._folds(dataset, (0.1, 0.5))
            budget, low = budget / 2, 0.5
        # The last weights are taken, and not the best on the hold-out, which judges them later.
        result = self._train(dataset.labels, learned, start, budget=budget, span=(low, 0.9))
        found = self._predict(result.detector, held, {"stage": "holdout"}, (0.9, 0.93))
        words = f"hold-out of {len(held)} images"
        return Measured(result, held, [found[s.key] for s in held], words, by_folds, False)

    def _by_folds(self, dataset: Dataset) -> Measured:
        """Measures each fold by a detector trained on the others, and trains one on all images."""
        by_folds = self._folds(dataset, (0.1, 0.6))
        share = by_folds.step_share
        result = self._train(
            dataset.labels,
            list(dataset.samples),
            None,
            budget=self._settings.train_budget,
            span=(0.6, 0.9),
            share=share,
        )
        measured = tuple(s for s in dataset.samples if s.key in by_folds.predictions)
        words = by_folds.words
        if share < 1:
            words += f"; the time for a training ended each after {share:.0%} of its steps"
        found = [by_folds.predictions[s.key] for s in measured]
        return Measured(result, measured, found, words, by_folds, True)

    def _folds(self, dataset: Dataset, span: tuple[float, float]) -> Folds:
        """Predicts each fold by a detector trained on the others.

        The first fold gets the share of the time that its steps are of all steps. Where it needs
        more, every training takes the same share of its own steps, the version's as well.
        """
        by_key = {s.key: s for s in dataset.samples}
        groups, parted = fold_groups(dataset.task_of, dataset.clip_of)
        count = 2 if len(by_key) <= FEW_IMAGES else FOLDS
        parts = folds(groups, min(count, len(set(groups.values()))), seed=0)
        images = [len(by_key) - len(part) for part in parts]
        steps = [steps_for(self.preset, n, pretrained=True) for n in (*images, len(by_key))]
        share = 1.0
        found: dict[str, Detections] = {}
        low, high = span
        for number, part in enumerate(parts):
            begin = low + (high - low) * number / len(parts)
            end = low + (high - low) * (number + 1) / len(parts)
            budget = self._settings.train_budget * steps[number] / sum(steps)
            fold = self._train(
                dataset.labels,
                [s for s in dataset.samples if s.key not in part],
                None,
                budget=budget * (_SPARE if number else 1),
                span=(begin, end),
                seed=number,
                fold={"fold": number + 1, "folds": len(parts)},
                share=share,
            )
            if not number and fold.stopped == "budget":
                share = fold.steps / fold.planned
            found |= self._predict(
                fold.detector,
                [by_key[key] for key in sorted(part)],
                {"stage": "fold", "fold": number + 1, "folds": len(parts)},
                (end, end),
            )
        return Folds(parts, found, parted, share)

    def _alike(self, measured: Measured, dataset: Dataset, live: Live) -> Comparison | None:
        """Compares the new version's folds with those of the live version, on the same images.

        Both were trained on the same share of the images that their version learned. None where
        one of the two has no folds.
        """
        if measured.folds is None:
            return None
        common = [
            s
            for s in dataset.samples
            if s.key in live.out_of_fold and s.key in measured.folds.predictions
        ]
        if not common:
            return None
        ours = calibrated_across(
            [measured.folds.predictions[s.key] for s in common],
            common,
            dataset.labels,
            _calibration_parts(common, dataset),
        )
        return compare(
            ours,
            self._of_live(live, common, dataset.labels),
            common,
            dataset.labels,
            known=live.detector.thresholds,
            seed=0,
        )

    def _against_live_head(self, measured: Measured, dataset: Dataset) -> Comparison | None:
        """Compares the folds with a live head that was fitted to the same images as each fold."""
        if measured.folds is None or not measured.by_folds or not self._settings.makes_live_heads:
            return None
        head = LiveHead(self._settings, self._device, self._tell_live_head, self._features)
        found = head.predict_unseen(dataset, measured.folds.parts)
        both = [
            (prediction, found[sample.key], sample)
            for sample, prediction in zip(measured.samples, measured.predictions, strict=True)
            if sample.key in found
        ]
        if not both:
            return None
        ours, theirs, samples = zip(*both, strict=True)
        return compare(ours, theirs, samples, dataset.labels, seed=0)

    def _tell_live_head(self, fraction: float, why: Reason) -> None:
        self._progress(0.95, reason(Code.MEASURING, stage="live_head"))

    def _train(
        self,
        labels: tuple[str, ...],
        samples: Sequence[Sample],
        start: Detector | None,
        *,
        budget: float,
        span: tuple[float, float],
        seed: int = 0,
        fold: Mapping[str, int] | None = None,
        share: float = 1.0,
    ) -> TrainingResult:
        low, high = span

        def tell(progress: Progress) -> None:
            stage = Reason(progress.stage.code, {**progress.stage.values, **(fold or {})})
            self._progress(low + (high - low) * progress.fraction, stage)

        return train(
            self.preset,
            labels,
            samples,
            start=start,
            weights=self._settings.weights,
            device=self._device,
            seed=seed,
            budget_seconds=budget,
            step_share=share,
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
        def tell(fraction: float) -> None:
            why = reason(Code.MEASURING, stage="live", share=fraction)
            self._progress(0.93 + 0.03 * fraction, why)

        return predictions_of_live(
            live, samples, labels, max_pixels=self._settings.image_max_pixels, on_progress=tell
        )

    def _reference(self, dataset: Dataset, detector: Detector, assessment: Assessment) -> Reference:
        stage = {"stage": "embedding"}
        seen = self._predict(detector, firsts(dataset, dataset.samples), stage, (0.97, 1.0))
        rows = [d.embedding for d in seen.values() if d.embedding is not None]
        return reference_of(dataset, assessment, rows)


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
