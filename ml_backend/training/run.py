"""One training, from the stored annotations to a verdict; runs in a process of its own."""

from __future__ import annotations

import dataclasses
import logging
import secrets
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from sqlalchemy import select

from ml_backend import __version__
from ml_backend.detection.architectures.base import WeightsError
from ml_backend.detection.detector import CorruptDetector
from ml_backend.detection.device import DeviceError, describe_device, resolve_device
from ml_backend.detection.presets import PresetError, check, live_head, preset_named
from ml_backend.jobs.outcomes import Done, Refused, RetryLater
from ml_backend.jobs.reports import Reporter
from ml_backend.label_studio.images import ImageUnavailable
from ml_backend.label_studio.label_config import LabelConfigError, parse_label_config
from ml_backend.projects.clients import Clients
from ml_backend.reasons import Code, reason
from ml_backend.remedies import with_remedy
from ml_backend.settings import Settings
from ml_backend.store.artefacts import ArtefactStore, VersionMissing
from ml_backend.store.database import Database
from ml_backend.store.states import JobKind, JobState
from ml_backend.store.tables import Job, Project
from ml_backend.training.artefact import load_artefact
from ml_backend.training.dataset import Dataset, build_dataset
from ml_backend.training.live_head import LiveHead
from ml_backend.training.out_of_fold import save_out_of_fold
from ml_backend.training.outcome import Live, TrainingOutcome, cost_model
from ml_backend.training.promotion import Versions
from ml_backend.training.trainer import Trainer

_log = logging.getLogger(__name__)

_FOLDERS = {JobKind.TRAIN: "training", JobKind.LIVE_HEAD: "live-heads"}
"""Folders of the images that a job reads; both kinds may run at once."""


class TrainingRun:
    """Trains a project's next version and judges whether it should go live.

    Args:
        settings: budget, preset, weights, device.
        database: where the annotations are; it is only read.
        artefacts: receives the version.
        label_studios: where images are read.
        report: hears how far the training is.
        label_studio_fails: why Label Studio could not be read back just now; None where it could.
    """

    def __init__(
        self,
        settings: Settings,
        database: Database,
        artefacts: ArtefactStore,
        label_studios: Clients,
        report: Reporter,
        label_studio_fails: str | None = None,
    ) -> None:
        self._settings = settings
        self._database = database
        self._artefacts = artefacts
        self._label_studios = label_studios
        self._versions = Versions(database, artefacts)
        self._report = report
        self._label_studio_fails = label_studio_fails

    def run(self, project_id: int, kind: JobKind = JobKind.TRAIN) -> Done:
        """Trains, measures and judges a version, and publishes its artefact.

        Args:
            project_id: the project.
            kind: `TRAIN` trains the detector of the preset, `LIVE_HEAD` fits a live head.

        Raises:
            Refused: too little to learn from, nothing to detect, or a wrong setting.
            RetryLater: Label Studio fails, and images that are needed lie there.
            TrainingDiverged: the loss became NaN.
        """
        started = time.monotonic()
        device = self._checked()
        with self._database.reading() as session:
            project = session.get_one(Project, project_id)
        try:
            config = parse_label_config(project.label_config)
        except LabelConfigError as error:
            raise Refused(reason(Code.LABEL_CONFIG_UNUSABLE, detail=str(error))) from error
        if kind == JobKind.TRAIN and not self._fits_live_head(project):
            # One training of a project runs at a time, so nobody is writing an artefact of it.
            self._versions.remove_unrecorded(project.id)
        live = self._live(project, device)
        if kind == JobKind.LIVE_HEAD and live is not None and not live.is_live_head:
            raise Refused(reason(Code.TRAINED_IS_LIVE))
        presets = [preset_named(self._settings.preset, device), live_head.PRESET]
        presets += [live.detector.preset] if live is not None else []
        # For the same reason, files that are there were left by a killed training.
        folder = self._settings.model_dir / _FOLDERS[kind] / project.key
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
                # While Label Studio fails, its images cannot be told from images that are gone.
                leave_out=self._label_studio_fails is None,
                # A training decides them once, for more tasks at a time.
                store_sides=self._report.sides if kind == JobKind.TRAIN else _store_nothing,
                on_progress=lambda f, why: self._report.progress(0.1 * f, why),
            )
            _check(dataset)
            return self._learn(project, dataset, live, device, started, kind)
        except ImageUnavailable as error:
            detail = self._label_studio_fails or str(error)
            raise RetryLater(
                reason(Code.LABEL_STUDIO_FAILS, detail=detail), self._label_studios.wait(project)
            ) from error
        finally:
            shutil.rmtree(folder)

    def _checked(self) -> torch.device:
        """Resolves the device, and checks settings that may have changed since the job was made."""
        try:
            device = resolve_device(self._settings.device)
            check(self._settings.preset, self._settings.weights, device)
        except (DeviceError, PresetError, WeightsError) as error:
            raise Refused(reason(Code.SETTING_WRONG, detail=with_remedy(error))) from error
        return device

    def _learn(
        self,
        project: Project,
        dataset: Dataset,
        live: Live | None,
        device: torch.device,
        started: float,
        kind: JobKind,
    ) -> Done:
        features = self._settings.model_dir / "features" / project.key
        best = self._versions.best(project.id)
        if kind == JobKind.LIVE_HEAD:
            head = LiveHead(self._settings, device, self._report.progress, features)
            outcome = head.fit(dataset, live)
        else:
            trainer = Trainer(self._settings, device, self._report.progress, features)
            outcome = trainer.fit(dataset, live, self._best(project, best, device))
        name = self._name(project, dataset, outcome)
        card = self._card(name, project, dataset, outcome)
        card["kind"] = kind
        if not outcome.out_of_fold:
            change = outcome.behind_best or outcome.comparison
            card["best"] = best if best is not None and change and change.delta < 0 else name
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

        self._report.check()
        self._artefacts.publish(project.key, name, write, card)
        return Done(
            outcome.verdict.reason,
            name,
            {
                "card": card,
                "promote": outcome.verdict.promote,
                "parent": project.live_version,
                "revision": dataset.revision,
            },
        )

    def _live(self, project: Project, device: torch.device) -> Live | None:
        if project.live_version is None:
            return None
        # Where it cannot be loaded it cannot predict either, so that any new version is better.
        return self._loaded(project, project.live_version, device)

    def _best(self, project: Project, name: str | None, device: torch.device) -> Live | None:
        """Loads the best version that a hold-out has measured, where it is not live."""
        if name is None or name == project.live_version:
            return None
        return self._loaded(project, name, device)

    def _loaded(self, project: Project, name: str, device: torch.device) -> Live | None:
        try:
            found = load_artefact(self._artefacts.existing(project.key, name), device)
        except (VersionMissing, CorruptDetector) as error:
            _log.error("%s is not compared with: %s", name, error)
            return None
        return Live(name, found.detector, found.out_of_fold)

    def _fits_live_head(self, project: Project) -> bool:
        with self._database.reading() as session:
            running = select(Job.id).where(
                Job.project_id == project.id,
                Job.kind == JobKind.LIVE_HEAD,
                Job.state == JobState.RUNNING,
            )
            return session.scalar(running.limit(1)) is not None

    def _name(self, project: Project, dataset: Dataset, outcome: TrainingOutcome) -> str:
        number = self._versions.count(project.id) + 1
        # The random end distinguishes the version from one of the same number that was lost: Label
        # Studio may still hold predictions under its name.
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
            # The card never changes. The database holds the later states of the version.
            "verdict": {"promote": verdict.promote, **verdict.reason.as_dict()},
            "seconds": {"training": round(result.seconds, 1)},
            "training": {
                "epochs": result.epochs,
                "batch_size": result.batch_size,
                "steps": result.steps,
                "step_share": outcome.step_share,
                "stopped": result.stopped,
            },
            "software": {"ml_backend": __version__, "torch": torch.__version__},
        }


def _store_nothing(rows: list[dict[str, Any]]) -> None:
    pass


def _check(dataset: Dataset) -> None:
    if len(dataset.samples) < 2:
        raise Refused(
            reason(
                Code.TOO_FEW_IMAGES,
                images=len(dataset.samples),
                example=next(iter(dataset.left_out), None),
            )
        )
    if dataset.tasks < 2:
        raise Refused(reason(Code.ONE_TASK_ONLY))
    if not any(len(s.labels) for s in dataset.samples):
        raise Refused(reason(Code.NO_BOXES))
