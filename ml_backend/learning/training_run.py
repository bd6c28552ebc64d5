"""One training, from the store to a verdict. Runs in a process of its own (`supervisor`)."""

from __future__ import annotations

import dataclasses
import logging
import secrets
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ml_backend import __version__
from ml_backend.detection.detector import CorruptDetector, Detector
from ml_backend.detection.device import describe_device, resolve_device
from ml_backend.detection.evaluation import (
    Comparison,
    Evaluation,
    best_thresholds,
    bootstrap_interval,
    compare,
    evaluate,
)
from ml_backend.detection.training import Progress, TrainingResult, train
from ml_backend.detection.types import Detections, Sample
from ml_backend.detection.zoo import Preset, preset_named
from ml_backend.label_studio.client import LabelStudioError
from ml_backend.label_studio.label_config import LabelConfigError, parse_label_config
from ml_backend.learning.dataset import Dataset, build_dataset
from ml_backend.learning.honest import (
    load_out_of_fold,
    predict_samples,
    relabel,
    save_out_of_fold,
)
from ml_backend.learning.ingest import Ingest
from ml_backend.learning.label_studios import LabelStudios
from ml_backend.learning.promotion import Verdict, Versions, judge
from ml_backend.learning.reconcile import reconcile
from ml_backend.learning.split import SMALL, folds
from ml_backend.settings import Settings
from ml_backend.store.database import Database
from ml_backend.store.registry import Registry, VersionMissing
from ml_backend.store.tables import Project

_log = logging.getLogger(__name__)

FOLDS = 3
FOLDS_SHARE = 0.5
"""Share of the time budget that the folds take together, where folds decide."""
WARM_START_FROM = 1000
"""Annotated images from which a training starts from the live version.

Below, it starts from the preset's weights every time: warm starts generalise worse (Ash and
Adams, 2020), and starting anew costs little while data are few.
"""


class TrainingRefused(Exception):
    """There is nothing to train on; the text says why, and what to do."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a training led to.

    Attributes:
        version: name of the new version.
        verdict: whether it went live, and why.
    """

    version: str
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class _Measured:
    result: TrainingResult
    measured: tuple[Sample, ...]
    predictions: list[Detections]
    out_of_fold: dict[str, Detections]
    how: str


class TrainingRun:
    """Trains a project's next version and decides whether it goes live.

    Args:
        settings: budget, preset, weights, device.
        database: where the annotations are.
        registry: receives the version.
        label_studios: where annotations and images are read.
        on_progress: told the fraction done and a sentence; may raise to stop.
    """

    def __init__(
        self,
        settings: Settings,
        database: Database,
        registry: Registry,
        label_studios: LabelStudios,
        on_progress: Callable[[float, str], None],
    ) -> None:
        self._settings = settings
        self._database = database
        self._registry = registry
        self._label_studios = label_studios
        self._versions = Versions(database, registry)
        self._progress = on_progress

    def run(self, project_id: int) -> Outcome:
        """Does it all.

        Raises:
            TrainingRefused: too little to learn from, or nothing to detect.
        """
        started = time.monotonic()
        project = self._read_back(project_id)
        try:
            config = parse_label_config(project.label_config)
        except LabelConfigError as error:
            raise TrainingRefused(f"refused because of the label config: {error}") from error
        # One training per project at a time: what is there was left by one that was killed.
        folder = self._settings.model_dir / "training" / project.key
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            dataset = build_dataset(
                project,
                config,
                self._database,
                self._label_studios.images(project),
                folder,
                max_pixels=self._settings.image_max_pixels,
                on_progress=lambda f, words: self._progress(0.1 * f, words),
            )
            _check(dataset)
            return self._learn(project, dataset, started)
        finally:
            shutil.rmtree(folder)

    def _read_back(self, project_id: int) -> Project:
        with self._database.reading() as session:
            project = session.get_one(Project, project_id)
        client = self._label_studios.client(project)
        if client is None:
            _log.warning("project %s: no token, nothing is read back", project.key)
            return project
        self._progress(0.0, "reading back what changed in Label Studio")
        try:
            reconcile(project, client, self._database, Ingest(self._database))
        except LabelStudioError as error:
            # What the webhooks told is enough to learn from; the next training reads back again.
            _log.warning("project %s is trained on what webhooks told: %s", project.key, error)
        with self._database.reading() as session:
            return session.get_one(Project, project_id)

    def _learn(self, project: Project, dataset: Dataset, started: float) -> Outcome:
        device = resolve_device(self._settings.device)
        preset = preset_named(self._settings.preset, device)
        live = self._live(project, device)
        start = live if live is not None and len(dataset.samples) >= WARM_START_FROM else None
        if start is not None:
            start = start.with_labels(dataset.labels)
        if len(dataset.samples) < SMALL or not dataset.holdout:
            measured = self._by_folds(dataset, preset, device, start)
        else:
            measured = self._by_holdout(dataset, preset, device, start)

        self._progress(0.93, "measuring")
        labels = dataset.labels
        evaluation = evaluate(measured.predictions, measured.measured, labels)
        comparison = self._against_live(project, live, measured, labels)
        verdict = judge(evaluation, comparison, project.live_version)

        detector = measured.result.detector
        detector.thresholds = best_thresholds(measured.predictions, measured.measured, labels)
        name = self._name(project, preset, dataset, evaluation)
        card = self._card(name, project, dataset, measured, evaluation, comparison, verdict)
        card["settings"] = {
            "preset": preset.name,
            "weights": dataclasses.asdict(detector.weights),
            "started_from": "the live version" if start is not None else "the preset's weights",
            "device": describe_device(device),
            "threads": torch.get_num_threads(),
            "budget_seconds": self._settings.train_budget,
        }
        card["seconds"]["total"] = round(time.monotonic() - started, 1)

        def write(folder: Path) -> None:
            detector.save(folder)
            save_out_of_fold(folder, labels, measured.out_of_fold)

        self._registry.publish(project.key, name, write, card)
        self._versions.record(
            project.id,
            name,
            card,
            verdict,
            parent=project.live_version,
            revision=dataset.revision,
        )
        self._versions.prune(project.id, self._settings.keep_versions)
        return Outcome(name, verdict)

    def _by_holdout(
        self, dataset: Dataset, preset: Preset, device: torch.device, start: Detector | None
    ) -> _Measured:
        learned = [s for s in dataset.samples if s.key not in dataset.holdout]
        held = tuple(s for s in dataset.samples if s.key in dataset.holdout)
        result = self._train(
            dataset.labels,
            learned,
            preset,
            device,
            start,
            validation=held,
            budget=self._settings.train_budget,
            span=(0.1, 0.9),
        )
        found = self._predict(result.detector, held)
        return _Measured(
            result, held, [found[s.key] for s in held], {}, f"hold-out of {len(held)} images"
        )

    def _by_folds(
        self, dataset: Dataset, preset: Preset, device: torch.device, start: Detector | None
    ) -> _Measured:
        """Each fold's detector judges the images it has not seen; the version learns from all."""
        by_key = {s.key: s for s in dataset.samples}
        parts = folds(dataset.clip_of, min(FOLDS, len(set(dataset.clip_of.values()))), seed=0)
        budget = self._settings.train_budget
        out_of_fold: dict[str, Detections] = {}
        for number, part in enumerate(parts):
            learned = [s for s in dataset.samples if s.key not in part]
            begin = 0.1 + 0.4 * number / len(parts)
            fold = self._train(
                dataset.labels,
                learned,
                preset,
                device,
                start,
                validation=(),
                budget=budget * FOLDS_SHARE / len(parts),
                span=(begin, begin + 0.4 / len(parts)),
                seed=number,
                words=f"fold {number + 1} of {len(parts)}, ",
            )
            out_of_fold |= self._predict(fold.detector, [by_key[key] for key in sorted(part)])
        result = self._train(
            dataset.labels,
            list(dataset.samples),
            preset,
            device,
            start,
            validation=(),
            budget=budget * (1 - FOLDS_SHARE),
            span=(0.5, 0.9),
        )
        measured = tuple(s for s in dataset.samples if s.key in out_of_fold)
        return _Measured(
            result,
            measured,
            [out_of_fold[s.key] for s in measured],
            out_of_fold,
            f"{len(parts)} folds over {len(measured)} images",
        )

    def _train(
        self,
        labels: tuple[str, ...],
        samples: Sequence[Sample],
        preset: Preset,
        device: torch.device,
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
            preset,
            labels,
            samples,
            validation=validation,
            start=start,
            weights=self._settings.weights,
            device=device,
            seed=seed,
            budget_seconds=budget,
            threads=self._settings.training_threads,
            on_progress=tell,
        )

    def _predict(self, detector: Detector, samples: Sequence[Sample]) -> dict[str, Detections]:
        return predict_samples(detector, samples, max_pixels=self._settings.image_max_pixels)

    def _live(self, project: Project, device: torch.device) -> Detector | None:
        if project.live_version is None:
            return None
        try:
            folder = self._registry.existing(project.key, project.live_version)
            return Detector.load(folder, device)
        except (VersionMissing, CorruptDetector) as error:
            # It cannot serve either: whatever the new version can do is better.
            _log.error("the live version is not compared with: %s", error)
            return None

    def _against_live(
        self,
        project: Project,
        live: Detector | None,
        measured: _Measured,
        labels: tuple[str, ...],
    ) -> Comparison | None:
        if live is None or project.live_version is None:
            return None
        known = load_out_of_fold(self._registry.folder(project.key, project.live_version), labels)
        unseen = [s for s in measured.measured if s.key not in known]
        for key, found in self._predict(live, unseen).items():
            known[key] = relabel(found, live.labels, labels)
        return compare(
            measured.predictions,
            [known[s.key] for s in measured.measured],
            measured.measured,
            labels,
            seed=0,
        )

    def _name(
        self, project: Project, preset: Preset, dataset: Dataset, evaluation: Evaluation
    ) -> str:
        number = self._versions.count(project.id) + 1
        # The tail keeps it apart from a version of the same number whose registry was lost:
        # Label Studio may still hold predictions under that name.
        return (
            f"v{number}-{preset.name}-{dataset.tasks}tasks"
            f"-ap{round(100 * evaluation.map50)}-{secrets.token_hex(2)}"
        )

    @staticmethod
    def _card(
        name: str,
        project: Project,
        dataset: Dataset,
        measured: _Measured,
        evaluation: Evaluation,
        comparison: Comparison | None,
        verdict: Verdict,
    ) -> dict[str, Any]:
        interval = bootstrap_interval(
            measured.predictions, measured.measured, dataset.labels, seed=0
        )
        return {
            "version": name,
            "project": project.key,
            "parent": project.live_version,
            "labels": list(dataset.labels),
            "data": {
                "tasks": dataset.tasks,
                "images": len(dataset.samples),
                "holdout": len(dataset.holdout),
                "negatives": sum(len(s.labels) == 0 for s in dataset.samples),
                "boxes": dataset.boxes_by_label(),
                "left_out": dataset.left_out,
                "revision": dataset.revision,
            },
            "metrics": {
                "measured_on": measured.how,
                **dataclasses.asdict(evaluation),
                "map50_interval": dataclasses.asdict(interval),
            },
            "thresholds": measured.result.detector.thresholds,
            "comparison": dataclasses.asdict(comparison) if comparison else None,
            "promoted": verdict.promote,
            "reason": verdict.reason,
            "seconds": {"training": round(measured.result.seconds, 1)},
            "training": {
                "epochs": measured.result.epochs,
                "batch_size": measured.result.batch_size,
                "stopped": measured.result.stopped,
            },
            "software": {"ml_backend": __version__, "torch": torch.__version__},
        }


def _check(dataset: Dataset) -> None:
    if len(dataset.samples) < 2:
        first = next(iter(dataset.left_out), "")
        raise TrainingRefused(
            f"refused because only {len(dataset.samples)} annotated images can be read"
            + (f"; for example: {first}" if first else ": annotate some and ask again")
        )
    if not any(len(s.labels) for s in dataset.samples):
        raise TrainingRefused(
            "refused because no annotation holds a box of the label config's labels"
        )
