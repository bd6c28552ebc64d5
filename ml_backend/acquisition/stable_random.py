"""Derives random numbers from names, so that a task gets the same number in every process."""

from __future__ import annotations

import hashlib


def chance(seed: str) -> float:
    """Hashes a seed to a number that is uniformly distributed in `[0, 1)`.

    Args:
        seed: any text; the same text gives the same number on every machine.
    """
    return int.from_bytes(hashlib.sha256(seed.encode()).digest()[:6]) / 2**48
