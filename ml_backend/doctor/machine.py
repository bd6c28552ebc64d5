"""Checks this machine: disk, device, weights, and the live versions' artefacts."""

from __future__ import annotations

import shutil
from collections.abc import Iterable

import torch
from sqlalchemy import select

from ml_backend.detection.detector import CorruptDetector, Detector
from ml_backend.detection.device import DeviceError, describe_device, resolve_device
from ml_backend.detection.presets import preset_named
from ml_backend.doctor.finding import Examined, Finding
from ml_backend.remedies import with_remedy
from ml_backend.store.artefacts import StoreUnavailable, VersionMissing
from ml_backend.store.tables import Project
from ml_backend.training.artefact import load_artefact

_ENOUGH_DISK = 2 * 2**30
"""Bytes."""


def disk(backend: Examined) -> Iterable[Finding]:
    """Checks the free space of `MODEL_DIR`."""
    free = shutil.disk_usage(backend.settings.model_dir).free
    where = f"{free / 2**30:.1f} GiB free in {backend.settings.model_dir}"
    if free < _ENOUGH_DISK:
        return [
            Finding(
                "disk",
                "warning",
                where,
                "make room, or set MODEL_DIR to a larger disk, or a smaller "
                "ML_BACKEND_IMAGE_CACHE_BYTES",
            )
        ]
    return [Finding("disk", "ok", where)]


def device(backend: Examined) -> Iterable[Finding]:
    """Checks whether the device of the settings can be used."""
    try:
        device = resolve_device(backend.settings.device)
    except DeviceError as error:
        return [Finding("device", "error", with_remedy(error))]
    described = ", ".join(str(value) for value in describe_device(device).values())
    return [Finding("device", "ok", described)]


def weights(backend: Examined) -> Iterable[Finding]:
    """Checks whether the weights of the settings can be loaded."""
    if backend.settings.weights == "none":
        return [Finding("weights", "ok", "none, as set: trainings start from nothing")]
    try:
        device = resolve_device("cpu")
        preset = preset_named(backend.settings.preset, resolve_device(backend.settings.device))
        loaded = Detector.pretrained(preset, ("object",), backend.settings.weights, device).weights
    except (DeviceError, ValueError, OSError) as error:
        return [Finding("weights", "error", with_remedy(error), "see ML_BACKEND_WEIGHTS")]
    if loaded.kind == "none":
        return [
            Finding(
                "weights",
                "warning",
                f"{preset.name}: {loaded.detail}",
                "allow the download, or set ML_BACKEND_WEIGHTS to a file; without, trainings "
                "start from nothing and need more annotations",
            )
        ]
    return [Finding("weights", "ok", f"{preset.name}: {loaded.detail}")]


def live_versions(backend: Examined) -> Iterable[Finding]:
    """Checks whether the live versions can be loaded; otherwise the version before serves."""
    with backend.database.reading() as session:
        projects = session.scalars(select(Project).where(Project.live_version.is_not(None)))
        live = [(p.key, p.live_version or "") for p in projects]
    for key, version in live:
        try:
            load_artefact(backend.artefacts.existing(key, version), torch.device("cpu"))
        except (VersionMissing, StoreUnavailable, CorruptDetector) as error:
            yield Finding(
                "live version",
                "error",
                f"project {key}: {version} cannot serve; an earlier one does, where there is "
                f"one: {error}",
                "restore the folder (it is tried again within a minute), or "
                f"`ml-backend rollback -p {key}`",
            )
        else:
            yield Finding("live version", "ok", f"project {key}: {version} loads")
