"""Finds the cores, memory and devices that this process may use, and ends it with its parent.

A container limits both through its control group (cgroup), while `os.cpu_count` and
`psutil.virtual_memory` answer for the whole host. Formats: Linux kernel documentation,
`admin-guide/cgroup-v2.rst` and `admin-guide/cgroup-v1/`.
"""

from __future__ import annotations

import ctypes
import math
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import psutil
from filelock import FileLock, Timeout

ROOT = Path("/")
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Memory:
    """Main memory of this process's control group, or of the machine where none limits it.

    Attributes:
        total: bytes.
        available: bytes that can still be taken without swapping; cached files count as available.
    """

    total: int
    available: int


def usable_cores(root: Path = ROOT) -> int:
    """Counts the cores that this process may use: by its affinity and by the quota of its cgroup.

    Args:
        root: the folder that holds `proc` and `sys`.

    Returns:
        At least 1. A quota of 1.5 cores counts as 2.
    """
    affinity = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    quotas = [math.ceil(quota) for quota in _cpu_quotas(root)]
    return max(1, min([affinity, *quotas]))


def memory(root: Path = ROOT) -> Memory:
    """Measures the memory that this process may use.

    Args:
        root: the folder that holds `proc` and `sys`.
    """
    host = psutil.virtual_memory()
    total, available = int(host.total), int(host.available)
    for limit, used in _memory_limits(root):
        total = min(total, limit)
        available = min(available, max(0, limit - used))
    return Memory(total, available)


def _cpu_quotas(root: Path) -> Iterator[float]:
    for group in _groups(root, "cpu"):
        words = _text(group / "cpu.max").split()
        if len(words) == 2 and words[0] != "max":
            yield int(words[0]) / int(words[1])
        quota = _number(group / "cpu.cfs_quota_us")
        period = _number(group / "cpu.cfs_period_us")
        if quota is not None and quota > 0 and period:
            yield quota / period


def _memory_limits(root: Path) -> Iterator[tuple[int, int]]:
    """Yields limit and use, in bytes, of each group that has a limit."""
    for group in _groups(root, "memory"):
        for limit_file, used_file, cache in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit, used = _number(group / limit_file), _number(group / used_file)
            if limit is not None and used is not None:
                # The kernel drops these pages before it refuses memory.
                yield limit, max(0, used - _statistic(group / "memory.stat", cache))


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Yields the folders of this process's cgroup and its ancestors: each may set a limit."""
    mount = root / "sys/fs/cgroup"
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        hierarchy = mount / controllers if controllers else mount
        if controllers and not hierarchy.is_dir():
            # Mounted under one of its names: `cpu,cpuacct` as `cpu`.
            hierarchy = mount / controller
        inside = PurePosixPath(path.lstrip("/"))
        for ancestor in (inside, *inside.parents):
            # A container without a cgroup namespace reads the host's path, and sees its own group
            # at the mount: folders that do not exist answer nothing.
            yield hierarchy / ancestor


def _number(file: Path) -> int | None:
    text = _text(file).strip()
    return int(text) if text.lstrip("-").isdigit() else None


def _statistic(file: Path, name: str) -> int:
    for line in _text(file).splitlines():
        key, _, value = line.partition(" ")
        if key == name:
            return int(value)
    return 0


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        return ""


def lock_device(folder: Path, devices: Iterable[str]) -> tuple[str, FileLock] | None:
    """Takes the first of several devices that no other process of the same kind has.

    Args:
        folder: holds the lock files of processes of this kind on this host; made if missing.
        devices: names of the devices, as `cpu` or `cuda:N`.

    Returns:
        The device, and its lock, which holds for as long as the object lives; None where others
        have them all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for device in devices:
        lock = FileLock(folder / f"{device.replace(':', '-')}.lock", blocking=False)
        try:
            lock.acquire()
        except Timeout:
            continue
        return device, lock
    return None


def die_with_parent(signum: signal.Signals = signal.SIGTERM) -> None:
    """Makes this process receive a signal when the thread that started it ends, however (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signum)
