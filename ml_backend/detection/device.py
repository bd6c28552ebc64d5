"""Which device detectors run on. A GPU that is there and cannot be used is never passed over."""

from __future__ import annotations

import platform
import shutil
from pathlib import Path

import torch


class DeviceError(RuntimeError):
    """The device asked for cannot be used; the text says why, and the remedy."""


def resolve_device(requested: str) -> torch.device:
    """The device that a setting names.

    Args:
        requested: `auto` (CUDA where there is a usable GPU, or else the CPU), `cpu`, `cuda`, or
            `cuda:N`.

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
    device = torch.device("cuda" if requested == "auto" else requested)
    count = torch.cuda.device_count()
    if device.index is not None and device.index >= count:
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
