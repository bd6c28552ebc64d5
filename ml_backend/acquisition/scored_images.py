"""Remembers the images that were scored, so that later look-alikes give way to them."""

from __future__ import annotations

import threading

import numpy as np

from ml_backend.detection.types import FloatArray

CAPACITY = 100_000
"""Scored images that are remembered; the oldest are forgotten first."""


class ScoredImages:
    """Remembers scored images in the order of their first scoring. Safe for several threads.

    Args:
        threshold: cosine similarity from which two images are look-alikes, below 1.
        capacity: images that are remembered.
    """

    def __init__(self, threshold: float, *, capacity: int = CAPACITY) -> None:
        self._threshold = threshold
        self._capacity = capacity
        self._lock = threading.Lock()
        # A ring: image number `n`, counted from 0, lies in slot `n % capacity`.
        self._rows = np.zeros((0, 0), np.float32)
        self._numbers = np.zeros(capacity, np.int64)
        self._count = 0
        self._number_of: dict[int, int] = {}
        self._task_in: dict[int, int] = {}

    def crowding(self, task: int | None, row: FloatArray) -> float:
        """Counts the look-alikes that were scored before an image, and remembers the image.

        A task that comes again is compared with the same images as the first time, those that
        were scored before its first scoring: the first of a group keeps its place.

        Args:
            task: id of the task; None for an image that nobody can ask for again.
            row: float32 `[D]`, unit length: the image's embedding.

        Returns:
            The number of look-alikes, each weighted by its similarity in `[0, 1]`.
        """
        with self._lock:
            known = self._number_of.get(task) if task is not None else None
            number = self._count if known is None else known
            used = min(self._count, self._capacity)
            if used:
                earlier = self._numbers[:used] < number
                similar = np.where(earlier, self._rows[:used] @ row, -1.0)
            else:
                similar = np.zeros(0)
            if known is None:
                self._remember(task, row)
        weights = np.clip((similar - self._threshold) / (1 - self._threshold), 0.0, 1.0)
        return float(np.sqrt(weights).sum())

    def _remember(self, task: int | None, row: FloatArray) -> None:
        slot = self._count % self._capacity
        if slot == len(self._rows):
            size = min(self._capacity, 2 * len(self._rows) + 256)
            grown = np.zeros((size, len(row)), np.float32)
            if len(self._rows):
                grown[: len(self._rows)] = self._rows
            self._rows = grown
        self._rows[slot] = row
        self._numbers[slot] = self._count
        forgotten = self._task_in.pop(slot, None)
        if forgotten is not None:
            del self._number_of[forgotten]
        if task is not None:
            self._task_in[slot] = task
            self._number_of[task] = self._count
        self._count += 1
