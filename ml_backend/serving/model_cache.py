"""Caches loaded detectors: loads on demand, swaps versions without a pause, evicts by memory."""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from sqlalchemy import select

from ml_backend.acquisition.factory import make_strategy
from ml_backend.acquisition.reference import Reference
from ml_backend.acquisition.strategies.base import Strategy
from ml_backend.detection.detector import CorruptDetector, Detector
from ml_backend.detection.device import resolve_device
from ml_backend.detection.presets import preset_named
from ml_backend.machine import memory, usable_cores
from ml_backend.serving.batching import BatchingPredictor
from ml_backend.serving.own_device import own_device, serving_devices
from ml_backend.settings import Settings
from ml_backend.store.artefacts import ArtefactStore, StoreUnavailable, VersionMissing
from ml_backend.store.database import Database
from ml_backend.store.tables import PRETRAINED, ModelVersion, Project
from ml_backend.training.artefact import load_artefact
from ml_backend.training.promotion import counts_of

_log = logging.getLogger(__name__)

MIN_FREE_MEMORY = 0.1
"""Fraction of free memory below which the least recently used model is evicted."""
_WATCH = 1.0
"""Seconds between two looks for promotions and rollbacks."""
_RETRY = 60.0
"""Seconds after which a version that could not be loaded is tried again."""


@dataclass(slots=True, eq=False)
class LoadedModel:
    """Holds a detector that is ready to predict, and counts its users; its maker is the first.

    Attributes:
        version: the model version that its predictions name.
        labels: label names; the labels of its detections are indices into them.
        thresholds: confidence from which a box is shown, by label; labels that are missing had no
            box in training and are never predicted.
        predictor: predicts, in batches.
        strategy: computes acquisition scores.
        generic: whether this is the COCO detector, whose classes must be matched to labels.
    """

    version: str
    labels: tuple[str, ...]
    thresholds: Mapping[str, float]
    predictor: BatchingPredictor
    strategy: Strategy
    generic: bool = False
    _users: int = 1
    _closing: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def acquire(self) -> None:
        """Adds a user: the model stays open until the matching `release`."""
        with self._lock:
            self._users += 1

    def release(self) -> None:
        """Removes a user; the last one of a model that is closing closes the model."""
        with self._lock:
            self._users -= 1
            last = self._closing and not self._users
        if last:
            self.predictor.close()

    def close(self) -> None:
        """Closes the model as soon as it has no user."""
        with self._lock:
            self._closing = True
            idle = not self._users
        if idle:
            self.predictor.close()

    def close_if_idle(self) -> bool:
        """Closes the model if it has no user now; answers whether it did."""
        with self._lock:
            if self._users:
                return False
            self._closing = True
        self.predictor.close()
        return True


class ModelCache:
    """Holds loaded models by project. Each has a thread of its own; a lock shares the device.

    Args:
        settings: device, weights, strategy.
        database: names the live version of each project.
        artefacts: holds the versions. A loaded model is served without asking the store again.
    """

    def __init__(self, settings: Settings, database: Database, artefacts: ArtefactStore) -> None:
        self._settings = settings
        self._database = database
        self._artefacts = artefacts
        self._lock = threading.Lock()
        self._loading: dict[int, threading.Lock] = {}
        self._loaded: OrderedDict[int, LoadedModel] = OrderedDict()
        self._broken: dict[tuple[int, str], float] = {}
        self._generic: LoadedModel | None = None
        self._device: torch.device | None = None
        self._device_lock = threading.Lock()
        self._stopping = threading.Event()

    @property
    def device(self) -> torch.device:
        """Finds the device that the settings name.

        Raises:
            DeviceError: the device cannot be used.
        """
        if self._device is None:
            self._device = resolve_device(self._settings.device)
        return self._device

    def own_device(self) -> None:
        """Reserves a device for this process; every serving process calls this before it serves.

        Of several GPUs each process gets one; on a CPU the processes share the cores.

        Raises:
            DeviceError: the device cannot be used, or every GPU has its process.
        """
        devices = serving_devices(self._settings.device)
        # Several hosts may share one folder, and each has devices of its own.
        locks = self._settings.model_dir / "locks" / self._settings.this_host / "servers"
        self._device = own_device(devices, locks)
        if self._device.type == "cpu" and self._settings.workers > 1:
            # Several torch processes that each take every core slow each other many times over.
            torch.set_num_threads(max(1, usable_cores() // self._settings.workers))

    def version(self, project: Project) -> str:
        """Names the version that would predict now, without loading anything."""
        with self._lock:
            loaded = self._loaded.get(project.id)
            if loaded is not None:
                return loaded.version
            if project.live_version is None and self._generic is not None:
                return PRETRAINED
        return project.version

    @contextmanager
    def using(self, project: Project) -> Iterator[LoadedModel | None]:
        """Yields the model that predicts for a project, loaded if need be, open until the end.

        Yields None where the project has no version and there is no COCO detector: the project
        gets no predictions until its first training.
        """
        model = self._acquired(project)
        try:
            yield model
        finally:
            if model is not None:
                model.release()

    def _acquired(self, project: Project) -> LoadedModel | None:
        with self._lock:
            loaded = self._loaded.get(project.id)
            if loaded is not None:
                self._loaded.move_to_end(project.id)
            elif project.live_version is None:
                loaded = self._generic
            if loaded is not None:
                loaded.acquire()
                return loaded
            if project.live_version is None:
                return None
            loading = self._loading.setdefault(project.id, threading.Lock())
        with loading:
            with self._lock:
                loaded = self._loaded.get(project.id)
                if loaded is not None:
                    loaded.acquire()
                    return loaded
            return self._load(project)

    def watch(self) -> None:
        """Follows promotions and rollbacks until `close`: loads the new version, then swaps."""
        self._load_generic()
        while not self._stopping.wait(_WATCH):
            try:
                self._follow()
            except Exception:
                # The database may be unavailable for a moment; the next look tries again.
                _log.exception("promotions could not be looked up")

    def close(self) -> None:
        """Ends `watch`, and closes all models."""
        self._stopping.set()
        with self._lock:
            for loaded in self._loaded.values():
                loaded.close()
            self._loaded.clear()

    def _follow(self) -> None:
        with self._lock:
            known = {number: loaded.version for number, loaded in self._loaded.items()}
        if not known:
            return
        with self._database.reading() as session:
            projects = session.scalars(select(Project).where(Project.id.in_(known))).all()
        for project in projects:
            live = project.live_version
            if live in (None, known[project.id]) or self._is_broken(project.id, live):
                continue
            loaded = self._load(project)
            if loaded is not None:
                loaded.release()

    def _load(self, project: Project) -> LoadedModel | None:
        """Loads the version that serves a project, acquired for the caller."""
        for version, why in self._candidates(project):
            if self._is_broken(project.id, version):
                continue
            with self._lock:
                serving = self._loaded.get(project.id)
                if serving is not None and serving.version == version:
                    serving.acquire()
                    return serving
            started = time.monotonic()
            try:
                folder = self._artefacts.existing(project.key, version)
                artefact = load_artefact(folder, self.device)
            except (VersionMissing, StoreUnavailable, CorruptDetector) as error:
                self._broken[project.id, version] = time.monotonic()
                _log.error("project %s: %s cannot serve: %s", project.key, version, error)
                continue
            with self._database.reading() as session:
                card = session.scalars(
                    select(ModelVersion.card).where(
                        ModelVersion.project_id == project.id, ModelVersion.name == version
                    )
                ).one()
            self._broken.pop((project.id, version), None)
            detector = artefact.detector
            seen = {label for label, boxes in counts_of(card).items() if boxes}
            loaded = LoadedModel(
                version=version,
                labels=detector.labels,
                thresholds={k: v for k, v in detector.thresholds.items() if k in seen},
                predictor=BatchingPredictor(detector, device_lock=self._device_lock),
                strategy=self._strategy(artefact.reference, version),
            )
            with self._lock:
                old = self._loaded.pop(project.id, None)
                self._loaded[project.id] = loaded
            if old is not None:
                # Requests that use the old version finish with it.
                old.close()
            _log.info(
                "project %s: %s%s loaded in %.2f s",
                project.key,
                version,
                why,
                time.monotonic() - started,
            )
            self._make_room(project.id)
            return loaded
        return None

    def _is_broken(self, project_id: int, version: str) -> bool:
        """Tells whether a load of a version failed within the last `_RETRY` seconds."""
        since = self._broken.get((project_id, version))
        return since is not None and time.monotonic() < since + _RETRY

    def _candidates(self, project: Project) -> list[tuple[str, str]]:
        """Lists the live version, then the earlier live ones, which serve if its files are broken.

        Returns:
            Name of each version, and a remark for the log.
        """
        with self._database.reading() as session:
            earlier = session.scalars(
                select(ModelVersion.name)
                .where(ModelVersion.project_id == project.id, ModelVersion.state == "retired")
                .order_by(ModelVersion.promoted_at.desc())
            ).all()
        live = [(project.live_version, "")] if project.live_version else []
        return live + [(name, " (instead of the broken live version)") for name in earlier]

    def _make_room(self, keep: int) -> None:
        """Evicts idle models, least recently used first, until enough memory is free."""
        while _is_scarce(self.device):
            with self._lock:
                for number, model in self._loaded.items():
                    if number != keep and model.close_if_idle():
                        del self._loaded[number]
                        break
                else:
                    return
            _log.info("%s was evicted: memory is scarce", model.version)
            model.predictor.wait()
            del model

    def _load_generic(self) -> None:
        """Loads the COCO detector for projects without a version, if its weights are available."""
        if self._settings.weights == "none":
            return
        try:
            device = self.device
            detector = Detector.coco(preset_named(self._settings.preset, device), device)
        except Exception:
            _log.exception("the COCO detector cannot be loaded")
            return
        if detector is None:
            _log.warning(
                "there are no COCO weights for this preset: projects get empty predictions until "
                "their first training"
            )
            return
        self._generic = LoadedModel(
            version=PRETRAINED,
            labels=detector.labels,
            thresholds=dict.fromkeys(detector.labels, 0.5),
            predictor=BatchingPredictor(detector, device_lock=self._device_lock),
            strategy=self._strategy(Reference.unknown(len(detector.labels)), PRETRAINED),
            generic=True,
        )

    def _strategy(self, reference: Reference, version: str) -> Strategy:
        return make_strategy(
            self._settings.strategy, reference, version, self._settings.random_share
        )


def _is_scarce(device: torch.device) -> bool:
    """Tells whether memory is scarce even after unused memory has been returned."""
    if _memory_left(device) >= MIN_FREE_MEMORY:
        return False
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return _memory_left(device) < MIN_FREE_MEMORY


def _memory_left(device: torch.device) -> float:
    """Measures the fraction of the device's memory that is free."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return free / total
    room = memory()
    return room.available / room.total
