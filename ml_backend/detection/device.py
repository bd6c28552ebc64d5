"""Chooses the device that detectors run on. A GPU that fails is an error, never passed over."""

from __future__ import annotations

import platform
import shutil
from pathlib import Path

import torch


class DeviceError(RuntimeError):
    """The device asked for cannot be used; the text says why."""


class DevicesTaken(DeviceError):
    """Other processes own every GPU.

    Attributes:
        count: number of GPUs.
    """

    def __init__(self, message: str, count: int) -> None:
        super().__init__(message)
        self.count = count


def resolve_device(requested: str) -> torch.device:
    """Finds the device that a name stands for.

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
                f"there is an NVIDIA GPU, but PyTorch cannot use it ({_why_not()}): mend that"
            )
        return torch.device("cpu")
    if not usable:
        raise DeviceError(
            f"{requested} was asked for and PyTorch cannot use a GPU ({_why_not()}): mend that"
        )
    count = torch.cuda.device_count()
    if requested in {"auto", "cuda"}:
        freest = max(range(count), key=lambda i: torch.cuda.mem_get_info(i)[0])
        device = torch.device("cuda", freest)
    else:
        device = torch.device(requested)
    if device.index >= count:
        raise DeviceError(f"{requested} was asked for and there are {count} GPUs, numbered from 0")
    try:
        torch.zeros(1, device=device)
    except RuntimeError as error:
        raise DeviceError(
            f"{requested}: the GPU is there and fails ({error}): mend that"
        ) from error
    return device


def describe_device(device: torch.device) -> dict[str, str]:
    """Describes a device for people: its name and memory."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {
            "device": str(device),
            "name": properties.name,
            "memory": f"{properties.total_memory / 2**30:.0f} GiB",
        }
    return {"device": "cpu", "name": platform.processor() or platform.machine()}


def has_fast_bfloat16(device: torch.device) -> bool:
    """Tells whether bfloat16 saves time: on current GPUs, and on CPUs with AMX matrix units."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    return bool(torch.cpu.get_capabilities().get("amx_tile", False))


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
