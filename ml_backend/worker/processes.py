"""Processes that give way to others and end with the process that started them (Linux)."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def lower_priority(parent: int) -> None:
    """Gives this process the lowest priority and lets it die with its parent.

    Args:
        parent: the parent's process id. A parent that was killed before this call can no longer
            end this process, which then ends itself.
    """
    os.nice(19)
    die_with_parent(signal.SIGKILL)
    if os.getppid() != parent:
        raise SystemExit("the worker that started this process is gone")


def die_with_parent(signum: signal.Signals = signal.SIGTERM) -> None:
    """Lets the kernel send this process a signal when the thread that started it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signum)
