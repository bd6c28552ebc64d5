"""Measures a detector by its predictions of images that it has not learned.

One place calibrates confidences, chooses thresholds, and computes quality from them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from ml_backend.detection.calibration import Calibration, calibrate, fit_calibration
from ml_backend.detection.costs import CostModel, cheapest_thresholds, shown, thresholds_by_index
from ml_backend.detection.evaluation import (
    Comparison,
    Evaluation,
    Interval,
    agreement,
    bootstrap_interval,
    compare,
    evaluate,
)
from ml_backend.detection.types import Detections, Sample


@dataclass(frozen=True, slots=True)
class Assessment:
    """The quality of a detector on samples that it has not learned.

    Attributes:
        samples: the samples, image by image.
        labels: label names.
        predictions: for each sample the detections, calibrated by curves that were fitted to other
            samples.
        calibration: curves fitted to all samples, for use on new images.
        thresholds: confidence from which a box is worth showing, by label that was learned.
        evaluation: quality of the predictions.
        interval: of the mean AP50.
    """

    samples: tuple[Sample, ...]
    labels: tuple[str, ...]
    predictions: list[Detections]
    calibration: Calibration
    thresholds: dict[str, float]
    evaluation: Evaluation
    interval: Interval

    def compare(
        self, others: Sequence[Detections], thresholds: Mapping[str, float]
    ) -> tuple[Comparison, float]:
        """Compares with another detector on the same samples.

        Args:
            others: for each sample the other's detections, with indices into `labels`.
            thresholds: the other's thresholds; it knows the labels that have one.

        Returns:
            This detector minus the other; and how alike the boxes are that both show, in `[0, 1]`.
        """
        comparison = compare(
            self.predictions, others, self.samples, self.labels, known=thresholds, seed=0
        )
        alike = agreement(
            [self._shown(p, self.thresholds) for p in self.predictions],
            [self._shown(p, thresholds) for p in others],
        )
        return comparison, alike

    def _shown(self, found: Detections, thresholds: Mapping[str, float]) -> Detections:
        return shown(found, thresholds_by_index(self.labels, thresholds)[found.labels])


def assess(
    predictions: Sequence[Detections],
    samples: Sequence[Sample],
    labels: Sequence[str],
    *,
    parts: Sequence[Collection[str]],
    learned: Collection[str],
    costs: CostModel,
) -> Assessment:
    """Calibrates predictions and measures them.

    Args:
        predictions: for each sample the uncalibrated detections of a detector that has not learned
            it, with the size of the image.
        samples: the samples.
        labels: label names.
        parts: keys of the samples, divided so that related images share a part. Each part is
            calibrated by the others, since no figure may rest on curves that were fitted to it.
        learned: labels that were trained on; the others get no threshold, and are never shown.
        costs: seconds of human work, which thresholds minimise.
    """
    found = calibrated_across(predictions, samples, labels, parts)
    cheapest = cheapest_thresholds(found, samples, labels, costs)
    return Assessment(
        samples=tuple(samples),
        labels=tuple(labels),
        predictions=found,
        calibration=fit_calibration(predictions, samples, labels),
        thresholds={label: t for label, t in cheapest.items() if label in learned},
        evaluation=evaluate(found, samples, labels),
        interval=bootstrap_interval(found, samples, labels, seed=0),
    )


def calibrated_across(
    predictions: Sequence[Detections],
    samples: Sequence[Sample],
    labels: Sequence[str],
    parts: Sequence[Collection[str]],
) -> list[Detections]:
    """Calibrates each part of the samples by curves that were fitted to the others.

    Args:
        predictions: for each sample the uncalibrated detections, with the size of the image.
        samples: the samples.
        labels: label names.
        parts: keys of the samples of each part; a single one is calibrated by itself.
    """
    calibrated: dict[str, Detections] = {}
    for part in parts:
        others = [
            i for i, sample in enumerate(samples) if sample.key not in part or len(parts) == 1
        ]
        curves = fit_calibration(
            [predictions[i] for i in others], [samples[i] for i in others], labels
        )
        for sample, prediction in zip(samples, predictions, strict=True):
            if sample.key in part:
                calibrated[sample.key] = calibrate(prediction, labels, curves)
    return [calibrated[sample.key] for sample in samples]
