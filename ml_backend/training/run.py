"""One training, from the store to a verdict. Runs in a process of its own (`supervisor`)."""

from __future__ import annotations

import dataclasses
import logging
import secrets
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ml_backend import __version__
from ml_backend.detection.architectures.base import WeightsError
from ml_backend.detection.detector import CorruptDetector
from ml_backend.detection.device import DeviceError, describe_device, resolve_device
from ml_backend.detection.presets import PresetError, check, preset_named
from ml_backend.label_studio.client import LabelStudioError, Passing
from ml_backend.label_studio.images import ImageUnavailable
from ml_backend.label_studio.label_config import LabelConfigError, parse_label_config
from ml_backend.projects.clients import LabelStudios
from ml_backend.projects.ingest import Ingest
from ml_backend.projects.reconcile import reconcile
from ml_backend.remedies import with_remedy
from ml_backend.settings import Settings
from ml_backend.store.database import Database
from ml_backend.store.registry import Registry, VersionMissing
from ml_backend.store.tables import Project
from ml_backend.training.artefact import load_artefact
from ml_backend.training.dataset import Dataset, build_dataset
from ml_backend.training.out_of_fold import save_out_of_fold
from ml_backend.training.promotion import Verdict, Versions
from ml_backend.training.trainer import Live, Trainer, TrainingOutcome, cost_model

_log = logging.getLogger(__name__)


class TrainingRefused(Exception):
    """There is nothing to train on; the text says why, and what to do."""


class PutOff(Exception):
    """It cannot be done now, and can later; the text says why.

    Attributes:
        wait: seconds after which it is worth another try.
    """

    def __init__(self, why: str, wait: float) -> None:
        super().__init__(why)
        self.wait = wait


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a training led to.

    Attributes:
        version: name of the new version.
        verdict: whether it went live, and why.
    """

    version: str
    verdict: Verdict


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
            TrainingRefused: too little to learn from, nothing to detect, or a wrong setting.
            PutOff: Label Studio fails, and images that are needed lie there.
            TrainingDiverged: the loss became NaN.
        """
        started = time.monotonic()
        device = self._checked()
        project, failure = self._read_back(project_id)
        try:
            config = parse_label_config(project.label_config)
        except LabelConfigError as error:
            raise TrainingRefused(f"refused because of the label config: {error}") from error
        live = self._live(project, device)
        presets = [preset_named(self._settings.preset, device)]
        presets += [live.detector.preset] if live is not None else []
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
                # The live version is measured on the same files.
                longest_side=max(preset.longest_side for preset in presets),
                random_share=self._settings.random_share,
                # While Label Studio fails, those that lie there would count as gone.
                leave_out=failure is None,
                on_progress=lambda f, words: self._progress(0.1 * f, words),
            )
            _check(dataset)
            return self._learn(project, dataset, live, device, started)
        except ImageUnavailable as error:
            raise PutOff(str(failure or error), self._label_studios.wait(project)) from error
        finally:
            shutil.rmtree(folder)

    def _checked(self) -> torch.device:
        """The device, once it is certain that the settings serve: they may be newer than a job."""
        try:
            device = resolve_device(self._settings.device)
            check(self._settings.preset, self._settings.weights, device)
        except (DeviceError, PresetError, WeightsError) as error:
            raise TrainingRefused(f"refused because of a setting: {with_remedy(error)}") from error
        return device

    def _read_back(self, project_id: int) -> tuple[Project, Passing | None]:
        """The project, brought up to date; and why that could not be, where it may be later."""
        failure = None
        with self._database.reading() as session:
            project = session.get_one(Project, project_id)
        client = self._label_studios.client(project)
        if client is None:
            _log.warning("project %s: no token, nothing is read back", project.key)
            return project, None
        self._progress(0.0, "reading back what changed in Label Studio")
        try:
            reconcile(project, client, self._database, Ingest(self._database))
        except LabelStudioError as error:
            # What the webhooks told is enough to learn from; the next training reads back again.
            _log.warning("project %s is trained on what webhooks told: %s", project.key, error)
            failure = error if isinstance(error, Passing) else None
        with self._database.reading() as session:
            return session.get_one(Project, project_id), failure

    def _learn(
        self,
        project: Project,
        dataset: Dataset,
        live: Live | None,
        device: torch.device,
        started: float,
    ) -> Outcome:
        trainer = Trainer(self._settings, device, self._progress)
        outcome = trainer.fit(dataset, live)
        name = self._name(project, dataset, outcome)
        card = self._card(name, project, dataset, outcome)
        card["settings"] = {
            "preset": outcome.detector.preset.name,
            "weights": dataclasses.asdict(outcome.detector.weights),
            "started_from": "the live version" if outcome.warm else "the preset's weights",
            "device": describe_device(device),
            "threads": torch.get_num_threads(),
            "budget_seconds": self._settings.train_budget,
            "costs": dataclasses.asdict(cost_model(self._settings)),
        }
        card["seconds"]["total"] = round(time.monotonic() - started, 1)

        def write(folder: Path) -> None:
            outcome.detector.save(folder)
            outcome.reference.save(folder)
            save_out_of_fold(folder, dataset.labels, outcome.out_of_fold)

        self._registry.publish(project.key, name, write, card)
        verdict = self._versions.record(
            project.id,
            name,
            card,
            outcome.verdict,
            parent=project.live_version,
            revision=dataset.revision,
        )
        self._versions.prune(project.id, self._settings.keep_versions)
        return Outcome(name, verdict)

    def _live(self, project: Project, device: torch.device) -> Live | None:
        if project.live_version is None:
            return None
        try:
            folder = self._registry.existing(project.key, project.live_version)
            live = load_artefact(folder, device)
        except (VersionMissing, CorruptDetector) as error:
            # It cannot serve either: whatever the new version can do is better.
            _log.error("the live version is not compared with: %s", error)
            return None
        return Live(project.live_version, live.detector, live.out_of_fold)

    def _name(self, project: Project, dataset: Dataset, outcome: TrainingOutcome) -> str:
        number = self._versions.count(project.id) + 1
        # The tail keeps it apart from a version of the same number whose registry was lost:
        # Label Studio may still hold predictions under that name.
        return (
            f"v{number}-{outcome.detector.preset.name}-{dataset.tasks}tasks"
            f"-ap{round(100 * outcome.assessment.evaluation.map50)}-{secrets.token_hex(2)}"
        )

    @staticmethod
    def _card(
        name: str, project: Project, dataset: Dataset, outcome: TrainingOutcome
    ) -> dict[str, Any]:
        comparison, verdict, result = outcome.comparison, outcome.verdict, outcome.result
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
                "measured_on": outcome.measured_on,
                **dataclasses.asdict(outcome.assessment.evaluation),
                "map50_interval": dataclasses.asdict(outcome.assessment.interval),
            },
            "thresholds": outcome.detector.thresholds,
            "comparison": dataclasses.asdict(comparison) if comparison else None,
            "agreement": outcome.agreement,
            # What became of it stands in the database: somebody may roll back meanwhile.
            "verdict": dataclasses.asdict(verdict),
            "seconds": {"training": round(result.seconds, 1)},
            "training": {
                "epochs": result.epochs,
                "batch_size": result.batch_size,
                "stopped": result.stopped,
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
    if dataset.tasks < 2:
        raise TrainingRefused(
            "refused because all images are one task's, and nothing is left to measure on: "
            "annotate another one and ask again"
        )
    if not any(len(s.labels) for s in dataset.samples):
        raise TrainingRefused(
            "refused because no annotation holds a box of the label config's labels"
        )
