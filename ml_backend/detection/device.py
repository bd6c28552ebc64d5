"""Which device detectors run on. A GPU that is there and cannot be used is never passed over."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from filelock import FileLock, Timeout


class DeviceError(RuntimeError):
    """The device asked for cannot be used; the text says why, and the remedy."""


def resolve_device(requested: str) -> torch.device:
    """The device that a setting names.

    Args:
        requested: `auto` (CUDA where there is a usable GPU, or else the CPU), `cpu`, `cuda` (of
            several GPUs the one with the most free memory), or `cuda:N`.

    Raises:
        DeviceError: a GPU was asked for, or is there, and cannot be used.
    """
    if requested == "cpu":
        return torch.device("cpu")
    usable = torch.cuda.is_available()
    if requested == "auto" and not usable:
        if _gpu_seems_present():
            raise DeviceError(
                f"there is an NVIDIA GPU, but PyTorch cannot use it ({_why_not()}): mend that, "
                "or set ML_BACKEND_DEVICE=cpu to run without it"
            )
        return torch.device("cpu")
    if not usable:
        raise DeviceError(
            f"{requested} was asked for and PyTorch cannot use a GPU ({_why_not()}): mend that, "
            "or set ML_BACKEND_DEVICE=cpu"
        )
    count = torch.cuda.device_count()
    if requested in {"auto", "cuda"}:
        freest = max(range(count), key=lambda i: torch.cuda.mem_get_info(i)[0])
        device = torch.device("cuda", freest)
    else:
        device = torch.device(requested)
    if device.index >= count:
        raise DeviceError(
            f"{requested} was asked for and there are {count} GPUs, numbered from 0: "
            "change ML_BACKEND_DEVICE"
        )
    try:
        torch.zeros(1, device=device)
    except RuntimeError as error:
        raise DeviceError(
            f"{requested}: the GPU is there and fails ({error}): mend that, or set "
            "ML_BACKEND_DEVICE=cpu"
        ) from error
    return device


def serving_devices(requested: str) -> list[torch.device]:
    """The devices that the server's processes may own, by the same setting.

    Raises:
        DeviceError: as `resolve_device`.
    """
    device = resolve_device(requested)
    if device.type == "cuda" and requested in {"auto", "cuda"}:
        return [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    return [device]


def own_device(devices: Sequence[torch.device], folder: Path) -> torch.device:
    """Makes one of several GPUs this process's own, for as long as it lives; a CPU is shared.

    Two processes on one GPU only slow each other, and hold the models twice.

    Args:
        devices: of which one is wanted.
        folder: holds the lock files, common to the processes that compete.

    Raises:
        DeviceError: other processes own them all.
    """
    for device in devices:
        if device.type == "cpu":
            return device
        lock = FileLock(folder / f"cuda-{device.index}.lock", blocking=False)
        try:
            lock.acquire()
        except Timeout:
            continue
        # Kept: the lock ends with the object, and so would the ownership.
        _OWNED.append(lock)
        return device
    names = ", ".join(map(str, devices))
    raise DeviceError(
        f"{names}: another process serves on {'it' if len(devices) == 1 else 'each of them'}; set "
        f"WORKERS={len(devices)}, one for each GPU, and start one server"
    )


_OWNED: list[FileLock] = []


def describe_device(device: torch.device) -> dict[str, str]:
    """Name and memory of a device, for people."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {
            "device": str(device),
            "name": properties.name,
            "memory": f"{properties.total_memory / 2**30:.0f} GiB",
        }
    return {"device": "cpu", "name": platform.processor() or platform.machine()}


def _gpu_seems_present() -> bool:
    return Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi") is not None


def _why_not() -> str:
    if torch.version.cuda is None:
        return "this build of PyTorch is for the CPU only"
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        return str(error).splitlines()[0]
    return "it sees no GPU"
