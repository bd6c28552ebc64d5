"""The loaded detectors: on demand, while memory lasts, swapped without a pause."""

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

from ml_backend.acquisition.acquisition import Reference, Strategy, strategy_named
from ml_backend.detection.detector import CorruptDetector, Detector
from ml_backend.detection.device import resolve_device
from ml_backend.detection.presets import preset_named
from ml_backend.machine import memory, usable_cores
from ml_backend.serving.batching import BatchingPredictor
from ml_backend.serving.own_device import own_device, serving_devices
from ml_backend.settings import Settings
from ml_backend.store.database import Database
from ml_backend.store.registry import Registry, VersionMissing
from ml_backend.store.tables import PRETRAINED, ModelVersion, Project
from ml_backend.training.artefact import load_artefact
from ml_backend.training.promotion import counts_of

_log = logging.getLogger(__name__)

SCARCE = 0.1
"""Share of memory below which the model used longest ago is let go."""
_WATCH = 1.0
_RETRY = 60.0
"""Seconds after which a version that could not be loaded is tried again."""


@dataclass(slots=True, eq=False)
class LoadedModel:
    """A detector that is ready to predict; it counts its users, of which its maker is the first.

    Attributes:
        version: what its predictions carry.
        labels: its label names; indices of its detections point into it.
        thresholds: confidence from which a box is shown, by label; labels that are missing were
            never seen in training and are never predicted.
        predictor: predicts, in batches.
        strategy: scores what is to be asked next.
        generic: whether it is the COCO detector, whose classes must be matched to labels.
    """

    version: str
    labels: tuple[str, ...]
    thresholds: Mapping[str, float]
    predictor: BatchingPredictor
    strategy: Strategy
    generic: bool = False
    _users: int = 1
    _let_go: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def hold(self) -> None:
        """Keeps it open until `release`; for who uses it, or finds it among the loaded ones."""
        with self._lock:
            self._users += 1

    def release(self) -> None:
        """One user less."""
        with self._lock:
            self._users -= 1
            last = self._let_go and not self._users
        if last:
            self.predictor.close()

    def let_go(self, *, if_idle: bool = False) -> bool:
        """Closes it, once the last user is done.

        Args:
            if_idle: only where nobody uses it.

        Returns:
            Whether it was let go.
        """
        with self._lock:
            if if_idle and self._users:
                return False
            self._let_go = True
            idle = not self._users
        if idle:
            self.predictor.close()
        return True


class Models:
    """Loaded models by project.

    One thread per model runs it; a lock makes the device theirs in turn.
    """

    def __init__(self, settings: Settings, database: Database, registry: Registry) -> None:
        self._settings = settings
        self._database = database
        self._registry = registry
        self._lock = threading.Lock()
        self._loading: dict[int, threading.Lock] = {}
        self._loaded: OrderedDict[int, LoadedModel] = OrderedDict()
        self._broken: dict[tuple[int, str], float] = {}
        self._generic: LoadedModel | None = None
        self._generic_tried = False
        self._device: torch.device | None = None
        self._device_lock = threading.Lock()
        self._stopping = threading.Event()

    @property
    def device(self) -> torch.device:
        """The device of the settings; a DeviceError says what is wrong with it."""
        if self._device is None:
            self._device = resolve_device(self._settings.device)
        return self._device

    def own_device(self) -> None:
        """Makes a device this process's own: what a server's process does before it serves.

        Of several GPUs each process gets one; on a CPU they share the cores.

        Raises:
            DeviceError: it cannot be used, or all GPUs have their process.
        """
        devices = serving_devices(self._settings.device)
        self._device = own_device(devices, self._settings.model_dir)
        if self._device.type == "cpu" and self._settings.workers > 1:
            # Several torch processes that each take every core slow each other many times over.
            torch.set_num_threads(max(1, usable_cores() // self._settings.workers))

    def version(self, project: Project) -> str:
        """The version that a prediction made now would carry; never loads anything."""
        with self._lock:
            loaded = self._loaded.get(project.id)
            if loaded is not None:
                return loaded.version
            if project.live_version is None and self._generic is not None:
                return PRETRAINED
        return project.version

    @contextmanager
    def using(self, project: Project) -> Iterator[LoadedModel | None]:
        """The model that predicts for a project, kept open meanwhile; loaded where it is not.

        None where the project has no version and no COCO detector can be had: nothing is
        predicted until the first training.
        """
        model = self._held(project)
        try:
            yield model
        finally:
            if model is not None:
                model.release()

    def _held(self, project: Project) -> LoadedModel | None:
        with self._lock:
            loaded = self._loaded.get(project.id)
            if loaded is not None:
                self._loaded.move_to_end(project.id)
            elif project.live_version is None:
                loaded = self._generic
            if loaded is not None:
                loaded.hold()
                return loaded
            if project.live_version is None:
                return None
            loading = self._loading.setdefault(project.id, threading.Lock())
        with loading:
            with self._lock:
                loaded = self._loaded.get(project.id)
                if loaded is not None:
                    loaded.hold()
                    return loaded
            return self._load(project)

    def watch(self) -> None:
        """Follows promotions and rollbacks: loads beside the old one, then swaps. Runs for ever."""
        self._load_generic()
        while not self._stopping.wait(_WATCH):
            try:
                self._follow()
            except Exception:
                # The database may be away for a moment; the next look tries again.
                _log.exception("looking for new versions failed")

    def close(self) -> None:
        """Stops watching, and the threads of all models."""
        self._stopping.set()
        with self._lock:
            for loaded in self._loaded.values():
                loaded.let_go()
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
        """Loads what predicts for a project, held for the caller."""
        for version, why in self._candidates(project):
            if self._is_broken(project.id, version):
                continue
            with self._lock:
                standing_in = self._loaded.get(project.id)
                if standing_in is not None and standing_in.version == version:
                    standing_in.hold()
                    return standing_in
            started = time.monotonic()
            try:
                folder = self._registry.existing(project.key, version)
                artefact = load_artefact(folder, self.device)
            except (VersionMissing, CorruptDetector) as error:
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
                # Requests under way finish on it.
                old.let_go()
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
        """Whether a version could not be loaded a moment ago; somebody may restore its folder."""
        since = self._broken.get((project_id, version))
        return since is not None and time.monotonic() < since + _RETRY

    def _candidates(self, project: Project) -> list[tuple[str, str]]:
        """The live version, and what serves where its artefact is broken: the ones before it."""
        with self._database.reading() as session:
            earlier = session.scalars(
                select(ModelVersion.name)
                .where(ModelVersion.project_id == project.id, ModelVersion.state == "retired")
                .order_by(ModelVersion.promoted_at.desc())
            ).all()
        live = [(project.live_version, "")] if project.live_version else []
        return live + [(name, " (instead of the broken live version)") for name in earlier]

    def _make_room(self, keep: int) -> None:
        """Lets go, one by one, of what was used longest ago; what is in use would free nothing."""
        while _is_scarce(self.device):
            with self._lock:
                for number, model in self._loaded.items():
                    if number != keep and model.let_go(if_idle=True):
                        del self._loaded[number]
                        break
                else:
                    return
            _log.info("%s was let go: memory is scarce", model.version)
            model.predictor.wait()
            del model

    def _load_generic(self) -> None:
        """COCO's detector serves projects without a version, where its weights can be had."""
        if self._settings.weights == "none":
            return
        try:
            device = self.device
            detector = Detector.coco(preset_named(self._settings.preset, device), device)
        except Exception:
            _log.exception("no COCO detector")
            return
        if detector is None:
            _log.warning(
                "no COCO weights for this preset can be had: projects get empty predictions "
                "until their first training"
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
        return strategy_named(
            self._settings.strategy, reference, version, self._settings.random_share
        )


def _is_scarce(device: torch.device) -> bool:
    """Whether memory is scarce even when what nobody uses has been given back."""
    if _memory_left(device) >= SCARCE:
        return False
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return _memory_left(device) < SCARCE


def _memory_left(device: torch.device) -> float:
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return free / total
    room = memory()
    return room.available / room.total
