"""Finds the devices of this host. Each worker owns one, so that a host trains on all at once."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

from filelock import FileLock

from ml_backend.machine import lock_device
from ml_backend.settings import Settings

_LIST = (
    "import sys; from ml_backend.serving.own_device import serving_devices; "
    "print(*serving_devices(sys.argv[1]))"
)


def devices_of_host(setting: str) -> list[str]:
    """The devices that a setting allows, as `cpu` or `cuda:N`.

    A process of its own asks PyTorch: a worker that does not import it takes a fifth of the memory.

    Args:
        setting: `ML_BACKEND_DEVICE`.

    Raises:
        RuntimeError: the device cannot be used; the text says why.
    """
    if setting == "cpu":
        return ["cpu"]
    done = subprocess.run(
        [sys.executable, "-c", _LIST, setting], capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = done.stderr.strip().splitlines()
        ended = f"the process that lists the devices ended with status {done.returncode}"
        raise RuntimeError(said[-1] if said else ended)
    return done.stdout.split()


def own_device(settings: Settings, devices: Sequence[str]) -> tuple[str, FileLock] | None:
    """Takes a device of this host for as long as the lock is held.

    Returns:
        The device and its lock; None where other workers of this host own them all.
    """
    # Several hosts may share one `MODEL_DIR`.
    return lock_device(settings.model_dir / "locks" / settings.this_host / "workers", devices)
