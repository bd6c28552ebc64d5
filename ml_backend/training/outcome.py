"""Holds what a training of either kind compares with, and what it comes to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ml_backend.acquisition.reference import Reference
from ml_backend.detection.assessment import Assessment
from ml_backend.detection.costs import CostModel
from ml_backend.detection.detector import Detector
from ml_backend.detection.evaluation import Comparison
from ml_backend.detection.prediction import predict_samples
from ml_backend.detection.presets import live_head
from ml_backend.detection.training import TrainingResult
from ml_backend.detection.types import Detections, Sample
from ml_backend.settings import Settings
from ml_backend.training.out_of_fold import relabel
from ml_backend.training.promotion import Verdict


@dataclass(frozen=True, slots=True)
class Live:
    """A version to compare with, and to start from.

    Attributes:
        name: the version.
        detector: its detector.
        out_of_fold: predictions of images that it has learned, by detectors that had not, by
            sample key; with label indices into `detector.labels`.
    """

    name: str
    detector: Detector
    out_of_fold: Mapping[str, Detections]

    @property
    def is_live_head(self) -> bool:
        """Whether it is a live head, and not a trained detector."""
        return self.detector.preset == live_head.PRESET


@dataclass(frozen=True, slots=True)
class TrainingOutcome:
    """A new version with its measurements.

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
        step_share: share of its steps that each training took; below 1 where the budget of time
            ended the first of them early.
        behind_best: comparison with the best version on the hold-out, where that is not live.
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
    step_share: float = 1.0
    behind_best: Comparison | None = None


def cost_model(settings: Settings) -> CostModel:
    """Makes the cost model of the settings."""
    return CostModel(
        look=settings.cost_look,
        draw=settings.cost_draw,
        correct=settings.cost_correct,
        delete=settings.cost_delete,
        relabel=settings.cost_relabel,
    )


def predictions_of_live(
    live: Live,
    samples: Sequence[Sample],
    labels: Sequence[str],
    *,
    max_pixels: int,
    on_progress: Callable[[float], None] | None = None,
) -> list[Detections]:
    """Answers a version's predictions of samples: out of fold where it has learned them.

    Args:
        live: the version.
        samples: whose images.
        labels: label names that the answer's indices refer to.
        max_pixels: larger images are refused.
        on_progress: told the fraction done; may raise to stop.
    """
    unseen = [s for s in samples if s.key not in live.out_of_fold]
    found = {
        **live.out_of_fold,
        **predict_samples(live.detector, unseen, max_pixels=max_pixels, on_progress=on_progress),
    }
    return [relabel(found[s.key], live.detector.labels, labels) for s in samples]
