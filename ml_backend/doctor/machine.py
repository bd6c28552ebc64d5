"""Checks this machine: disk, device, weights, where versions are stored, and the live versions."""

from __future__ import annotations

import shutil
from collections.abc import Iterable

import torch
from sqlalchemy import select

from ml_backend.detection.detector import CorruptDetector, Detector
from ml_backend.detection.device import DeviceError, describe_device, resolve_device
from ml_backend.detection.presets import preset_named
from ml_backend.doctor.finding import Examined, Finding, found
from ml_backend.remedies import with_remedy
from ml_backend.store.artefacts import StoreUnavailable, VersionMissing
from ml_backend.store.tables import Project
from ml_backend.training.artefact import load_artefact

_ENOUGH_DISK = 2 * 2**30
"""Bytes."""


def disk(backend: Examined) -> Iterable[Finding]:
    """Checks the free space of `MODEL_DIR`."""
    free = shutil.disk_usage(backend.settings.model_dir).free
    values = {"gib": free / 2**30, "folder": str(backend.settings.model_dir)}
    if free < _ENOUGH_DISK:
        return [found("disk", "warning", "disk_low", **values)]
    return [found("disk", "ok", "disk_free", **values)]


def device(backend: Examined) -> Iterable[Finding]:
    """Checks whether the device of the settings can be used."""
    try:
        device = resolve_device(backend.settings.device)
    except DeviceError as error:
        return [found("device", "error", "device_unusable", detail=with_remedy(error))]
    described = ", ".join(str(value) for value in describe_device(device).values())
    return [found("device", "ok", "device", device=described)]


def weights(backend: Examined) -> Iterable[Finding]:
    """Checks whether the weights of the settings can be loaded."""
    if backend.settings.weights == "none":
        return [found("weights", "ok", "weights_none_set")]
    try:
        device = resolve_device("cpu")
        preset = preset_named(backend.settings.preset, resolve_device(backend.settings.device))
        loaded = Detector.pretrained(preset, ("object",), backend.settings.weights, device).weights
    except (DeviceError, ValueError, OSError) as error:
        return [found("weights", "error", "weights_unusable", detail=with_remedy(error))]
    values = {"preset": preset.name, "detail": loaded.detail}
    if loaded.kind == "none":
        return [found("weights", "warning", "weights_missing", **values)]
    return [found("weights", "ok", "weights", **values)]


def artefacts(backend: Examined) -> Iterable[Finding]:
    """Checks whether model versions can be stored."""
    try:
        where = backend.artefacts.probe()
    except StoreUnavailable as error:
        return [found("artefacts", "error", "artefacts_unavailable", detail=str(error))]
    return [found("artefacts", "ok", "artefacts", detail=where)]


def live_versions(backend: Examined) -> Iterable[Finding]:
    """Checks whether the live versions can be loaded; otherwise the version before serves."""
    with backend.database.reading() as session:
        projects = session.scalars(select(Project).where(Project.live_version.is_not(None)))
        live = [(p.key, p.live_version or "") for p in projects]
    for key, version in live:
        try:
            load_artefact(backend.artefacts.existing(key, version), torch.device("cpu"))
        except (VersionMissing, StoreUnavailable, CorruptDetector) as error:
            yield found(
                "live version",
                "error",
                "version_unloadable",
                project=key,
                version=version,
                detail=str(error),
            )
        else:
            yield found("live version", "ok", "version_loads", project=key, version=version)
