"""A cache of files on disk with a limit for their total size."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import threading
from contextlib import suppress
from pathlib import Path

_log = logging.getLogger(__name__)


class DiskCache:
    """Keeps files on disk up to a total size; the least recently read are deleted first.

    Several processes may share the folder. If the disk is full, nothing is cached.

    Args:
        folder: holds the files.
        max_bytes: limit of the total size; 0 turns the cache off.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._total: int | None = None
        self._since_sweep = 0

    def get(self, key: str) -> bytes | None:
        """Reads the content of a key; None if it is not in the cache."""
        if not self._max_bytes:
            return None
        path = self._path(key)
        try:
            content = path.read_bytes()
        except OSError:
            return None
        with suppress(OSError):
            # The time of the last use decides which files are deleted first.
            os.utime(path)
        return content

    def put(self, key: str, content: bytes) -> None:
        """Stores the content of a key; readers never see a part of it."""
        if len(content) > self._max_bytes:
            return
        path = self._path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(
                dir=path.parent, prefix=".writing-", delete=False
            ) as file:
                file.write(content)
            Path(file.name).replace(path)
        except OSError as error:
            _log.warning("an image is not cached: %s", error)
            with suppress(OSError, UnboundLocalError):
                Path(file.name).unlink()
            return
        with self._lock:
            self._since_sweep += len(content)
            # The first sweep finds the files of earlier and other processes, later ones find the
            # files that others have written since.
            if (
                self._total is None
                or self._total + self._since_sweep > self._max_bytes
                or self._since_sweep > self._max_bytes // 20
            ):
                self._total = self._sweep()
                self._since_sweep = 0

    def _path(self, key: str) -> Path:
        name = hashlib.sha256(key.encode()).hexdigest()
        return self._folder / name[:2] / name

    def _sweep(self) -> int:
        """Deletes files down to nine tenths of the limit, if they exceed it; returns their size."""
        files: list[tuple[float, int, Path]] = []
        for path in self._folder.glob("*/*"):
            # Another process may have deleted it just now.
            with suppress(OSError):
                stat = path.stat()
                files.append((stat.st_mtime, stat.st_size, path))
        total = sum(size for _, size, _ in files)
        if total <= self._max_bytes:
            return total
        for _, size, path in sorted(files):
            if total <= self._max_bytes * 0.9:
                break
            with suppress(OSError):
                path.unlink()
            total -= size
        return total
