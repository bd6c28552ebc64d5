"""Processes that give way to others and end with the process that started them (Linux)."""

from __future__ import annotations

import os
import signal

from ml_backend.machine import die_with_parent


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
