"""Check what a training starts from and what it is measured on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ml_backend.demo.shapes import SHAPES, generate
from ml_backend.detection.detector import Detector
from ml_backend.detection.presets import Preset, preset_named
from ml_backend.detection.presets.live_head import PRESET as LIVE_HEAD
from ml_backend.detection.presets.tiny import PRESET as TINY
from ml_backend.detection.types import Detections, Sample
from ml_backend.reasons import Code
from ml_backend.settings import load_settings
from ml_backend.training import trainer as module
from ml_backend.training.dataset import Dataset
from ml_backend.training.live_head import LiveHead
from ml_backend.training.outcome import Live, TrainingOutcome
from ml_backend.training.trainer import Trainer

CPU = torch.device("cpu")
LABELS = SHAPES[:3]
SHORT = replace(TINY, name="short", min_size=64, max_size=96, batch_size=2, steps=2, epochs=0)
LONG = replace(SHORT, name="long", steps=5000)
OTHER = replace(SHORT, name="other", min_size=96)


@pytest.fixture(autouse=True)
def _few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a hold-out measure from twelve images on."""
    monkeypatch.setattr(module, "SMALL", 12)


def _dataset(
    folder: Path, images: int, clips: Mapping[int, int], holdout: range = range(0)
) -> Dataset:
    """Make a data set with one image for each task.

    Args:
        folder: receives the images.
        images: number of images.
        clips: clip of an image, where it is not the image's own.
        holdout: images that only measure.
    """
    samples = []
    for number, image in enumerate(generate(images, seed=0, width=128, height=96, most=2)):
        path = folder / image.name
        path.write_bytes(image.encoded())
        labels = np.array([LABELS.index(name) for name in image.labels], np.int64)
        samples.append(Sample(f"{number}-image", path, image.boxes, labels))
    return Dataset(
        labels=LABELS,
        samples=tuple(samples),
        task_of={s.key: number for number, s in enumerate(samples)},
        clip_of={s.key: clips.get(number, number) for number, s in enumerate(samples)},
        holdout=frozenset(samples[number].key for number in holdout),
        revision=images,
    )


def _fit(
    folder: Path,
    dataset: Dataset,
    live: Live | None = None,
    weights: str = "none",
    best: Live | None = None,
    **more: str,
) -> TrainingOutcome:
    settings = {
        "MODEL_DIR": str(folder),
        "ML_BACKEND_PRESET": "tests.test_trainer:SHORT",
        "ML_BACKEND_WEIGHTS": weights,
        "ML_BACKEND_TRAIN_THREADS": "1",
        **more,
    }
    return Trainer(load_settings(settings), CPU, lambda *_: None).fit(dataset, live, best)


@pytest.mark.parametrize("images", [9, 12])
def test_fit_images_that_all_look_alike_notes_optimistic_figures(
    tmp_path: Path, images: int
) -> None:
    outcome = _fit(tmp_path, _dataset(tmp_path, images, dict.fromkeys(range(images), 0)))
    assert len(outcome.out_of_fold) == images
    assert outcome.measured_on == (
        f"2 folds over {images} images; most of them look alike, and were learned from as well as "
        "measured on: the figures are optimistic"
    )


def test_fit_images_that_differ_are_measured_by_folds_without_a_note(tmp_path: Path) -> None:
    outcome = _fit(tmp_path, _dataset(tmp_path, 9, {1: 0, 2: 0}))
    assert outcome.measured_on == "2 folds over 9 images"


def test_fit_holdout_of_nearly_everything_measures_by_folds(tmp_path: Path) -> None:
    # Two images differ; the other ten are one clip, and all held out.
    clips = dict.fromkeys(range(2, 12), 2)
    outcome = _fit(tmp_path, _dataset(tmp_path, 12, clips, holdout=range(2, 12)))
    assert outcome.measured_on.startswith("2 folds over 12 images")
    some = _dataset(tmp_path, 12, {}, holdout=range(3))
    assert _fit(tmp_path, some).measured_on == "hold-out of 3 images"


def _perfect(dataset: Dataset) -> dict[str, Detections]:
    """Make detections of every box of a data set."""
    return {
        s.key: Detections(
            s.boxes, np.full(len(s.labels), 0.9, np.float32), s.labels, size=(128, 96)
        )
        for s in dataset.samples
    }


def _live(preset: Preset, out_of_fold: Mapping[str, Detections] | None = None) -> Live:
    detector = Detector.pretrained(preset, LABELS, "none", CPU)
    return Live("v1", detector, out_of_fold or {})


def test_fit_live_version_of_same_preset_starts_warm(tmp_path: Path) -> None:
    dataset = _dataset(tmp_path, 12, {}, holdout=range(3))
    assert _fit(tmp_path, dataset, _live(preset_named("tests.test_trainer:SHORT", CPU))).warm
    # The live version has another preset.
    other = _fit(tmp_path, dataset, _live(OTHER))
    assert not other.warm
    assert (other.detector.preset.name, other.detector.preset.min_size) == ("short", 64)
    # The live version was measured by folds, and has learned the images that measure now.
    learned = _live(SHORT, {"2-image": Detections.empty()})
    assert not _fit(tmp_path, dataset, learned).warm
    assert _fit(tmp_path, dataset, _live(SHORT, {"3-image": Detections.empty()})).warm


def test_fit_by_folds_never_starts_warm(tmp_path: Path) -> None:
    assert not _fit(tmp_path, _dataset(tmp_path, 12, {}), _live(SHORT)).warm


def test_fit_label_new_to_live_version_is_left_out_of_the_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = _dataset(tmp_path, 9, {})
    live = _live(SHORT)
    # The live version was trained before the label Triangle was added.
    live.detector.thresholds = dict.fromkeys(LABELS[:2], 0.5)
    perfect = _perfect(dataset)
    monkeypatch.setattr(
        Trainer, "_of_live", lambda _, live, samples, labels: [perfect[s.key] for s in samples]
    )
    comparison = _fit(tmp_path, dataset, live).comparison
    assert comparison is not None
    deltas = [comparison.per_class[label].delta for label in LABELS[:2]]
    assert comparison.delta == pytest.approx(sum(deltas) / 2)


def test_fit_few_images_with_pretrained_weights_starts_from_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = _dataset(tmp_path, 12, {}, holdout=range(3))
    live = _live(preset_named("tests.test_trainer:SHORT", CPU))
    weights = tmp_path / "weights.pth"
    torch.save(live.detector.module.state_dict(), weights)
    assert not _fit(tmp_path, dataset, live, str(weights)).warm
    monkeypatch.setattr(module, "WARM_START_FROM", 12)
    assert _fit(tmp_path, dataset, live, str(weights)).warm


def test_fit_worse_than_a_live_head_of_the_same_images_is_refused(tmp_path: Path) -> None:
    weights = tmp_path / "weights.pth"
    torch.save(_live(SHORT).detector.module.state_dict(), weights)
    outcome = _fit(tmp_path, _dataset(tmp_path, 9, {}), weights=str(weights))
    assert not outcome.verdict.promote
    assert outcome.verdict.reason.code == Code.WORSE_THAN_LIVE_HEAD


def test_fit_budget_that_binds_shortens_folds_and_version_alike_and_is_said(
    tmp_path: Path,
) -> None:
    outcome = _fit(
        tmp_path,
        _dataset(tmp_path, 6, {}),
        ML_BACKEND_PRESET="tests.test_trainer:LONG",
        ML_BACKEND_TRAIN_BUDGET="6",
    )
    assert 0 < outcome.step_share < 1
    assert outcome.result.steps == round(outcome.step_share * outcome.result.planned)
    assert outcome.measured_on == (
        "2 folds over 6 images; the time for a training ended each after "
        f"{outcome.step_share:.0%} of its steps"
    )


def test_fit_first_holdout_compares_folds_with_the_folds_of_the_live_version(
    tmp_path: Path,
) -> None:
    dataset = _dataset(tmp_path, 12, {}, holdout=range(3))
    perfect = {
        s.key: Detections(
            s.boxes, np.full(len(s.labels), 0.9, np.float32), s.labels, size=(128, 96)
        )
        for s in dataset.samples
    }
    live = _live(SHORT, perfect)
    live.detector.thresholds = dict.fromkeys(LABELS, 0.5)
    outcome = _fit(tmp_path, dataset, live)
    assert outcome.measured_on == "hold-out of 3 images"
    assert outcome.comparison is not None
    # All twelve images compare, though the hold-out is three of them.
    boxes = sum(len(s.labels) for s in dataset.samples)
    assert sum(change.support for change in outcome.comparison.per_class.values()) == boxes
    assert not outcome.verdict.promote


def test_fit_behind_the_best_version_on_the_holdout_is_refused(tmp_path: Path) -> None:
    dataset = _dataset(tmp_path, 12, {}, holdout=range(3))
    perfect = {
        s.key: Detections(
            s.boxes, np.full(len(s.labels), 0.9, np.float32), s.labels, size=(128, 96)
        )
        for s in dataset.samples
    }
    best = Live("v1", _live(SHORT).detector, perfect)
    best.detector.thresholds = dict.fromkeys(LABELS, 0.5)
    outcome = _fit(tmp_path, dataset, _live(SHORT), best=best)
    assert outcome.verdict.reason.code == Code.BEHIND_BEST
    assert outcome.behind_best is not None
    assert outcome.behind_best.delta < -0.5


def test_fit_live_head_is_live_is_compared_by_heads_of_the_same_folds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = _dataset(tmp_path, 6, {})
    weights = tmp_path / "weights.pth"
    torch.save(_live(SHORT).detector.module.state_dict(), weights)
    nothing = {s.key: Detections.empty() for s in dataset.samples}
    monkeypatch.setattr(LiveHead, "predict_unseen", lambda *_: nothing)
    # It was fitted to more images than a fold, and says that it finds everything.
    live = Live("v1-live", Detector.pretrained(LIVE_HEAD, LABELS, "none", CPU), _perfect(dataset))
    live.detector.thresholds = dict.fromkeys(LABELS, 0.5)
    outcome = _fit(tmp_path, dataset, live, str(weights))
    assert outcome.comparison is not None
    assert outcome.comparison.delta >= 0
    assert outcome.verdict.promote
