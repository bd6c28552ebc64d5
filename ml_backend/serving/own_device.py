"""Gives each process of a server a GPU of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from filelock import FileLock

from ml_backend.detection.device import DevicesTaken, resolve_device
from ml_backend.machine import lock_device


def serving_devices(requested: str) -> list[torch.device]:
    """Lists the devices that the processes of a server may own.

    Raises:
        DeviceError: as `resolve_device`.
    """
    device = resolve_device(requested)
    if device.type == "cuda" and requested in {"auto", "cuda"}:
        return [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    return [device]


def own_device(devices: Sequence[torch.device], folder: Path) -> torch.device:
    """Reserves one of several GPUs for this process, for as long as it lives; a CPU is shared.

    Two processes on one GPU slow each other and hold the models twice.

    Args:
        devices: of which one is wanted.
        folder: holds the lock files, common to the processes that compete.

    Raises:
        DevicesTaken: other processes own every GPU.
    """
    if devices[0].type == "cpu":
        return devices[0]
    taken = lock_device(folder, map(str, devices))
    if taken is not None:
        device, lock = taken
        # The lock is released when the object is collected: it is kept as long as the process.
        _OWNED.append(lock)
        return torch.device(device)
    names = ", ".join(map(str, devices))
    raise DevicesTaken(
        f"{names}: another process serves on {'it' if len(devices) == 1 else 'each of them'}",
        len(devices),
    )


_OWNED: list[FileLock] = []
