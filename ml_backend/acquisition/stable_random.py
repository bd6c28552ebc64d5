"""Chance that is always the same: for a task, who asks again gets the same answer."""

from __future__ import annotations

import hashlib


def chance(seed: str) -> float:
    """A number in `[0, 1)` that looks random, and is always the same for a seed."""
    return int.from_bytes(hashlib.sha256(seed.encode()).digest()[:6]) / 2**48
