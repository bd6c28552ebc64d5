"""The model registry: one folder a version below `MODEL_DIR`, written whole or not at all.

MODEL_DIR/projects/<project key>/<version>/
    model.safetensors, detector.json    the detector
    card.json                           what it is, how good, and how it came to be
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


class VersionMissing(LookupError):
    """The registry holds no such version; the text names it and the remedy."""


class Registry:
    """Artefacts of model versions.

    Args:
        root: `MODEL_DIR`.
    """

    def __init__(self, root: Path) -> None:
        self._root = root / "projects"

    def folder(self, project_key: str, version: str) -> Path:
        """Where a version lies, whether or not it does.

        Raises:
            ValueError: a name that leads elsewhere.
        """
        for name in (project_key, version):
            if not name or name.startswith(".") or "/" in name or "\\" in name or "\0" in name:
                raise ValueError(f"{name!r} cannot name a folder of the registry")
        return self._root / project_key / version

    def publish(
        self,
        project_key: str,
        version: str,
        write: Callable[[Path], None],
        card: dict[str, Any],
    ) -> Path:
        """Writes a version beside its place and moves it there when it is complete.

        Args:
            project_key: the project's key.
            version: name of the new version.
            write: writes the artefacts into the folder that it is given.
            card: the model card, JSON.

        Raises:
            FileExistsError: the version is there already; versions never change.
            OSError: it could not be written (disk full, read-only); nothing is left behind.
        """
        target = self.folder(project_key, version)
        if target.exists():
            raise FileExistsError(f"version {version} of project {project_key} exists already")
        target.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=".building-", dir=target.parent))
        try:
            write(building)
            (building / "card.json").write_text(json.dumps(card, indent=1), encoding="utf-8")
            for path in [*building.iterdir(), building]:
                _to_disk(path)
            building.chmod(0o755)
            building.rename(target)
            _to_disk(target.parent)
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            raise
        return target

    def existing(self, project_key: str, version: str) -> Path:
        """Folder of a version that must be there.

        Raises:
            VersionMissing: it is not.
        """
        folder = self.folder(project_key, version)
        if not (folder / "card.json").is_file():
            raise VersionMissing(
                f"version {version} is not in {folder.parent}: restore the folder, "
                "or roll back to another version"
            )
        return folder

    def versions(self, project_key: str) -> list[str]:
        """Names of the versions whose artefacts are there."""
        folder = self._root / project_key
        if not folder.is_dir():
            return []
        return sorted(p.name for p in folder.iterdir() if (p / "card.json").is_file())

    def remove(self, project_key: str, version: str) -> None:
        """Deletes a version's artefacts; the rename first, so that none is seen half deleted."""
        folder = self.folder(project_key, version)
        if folder.exists():
            doomed = Path(tempfile.mkdtemp(prefix=".removing-", dir=folder.parent))
            folder.rename(doomed / version)
            shutil.rmtree(doomed)

    def sweep(self) -> None:
        """Deletes what a killed process left half written; only while no training runs."""
        for pattern in ("*/.building-*", "*/.removing-*"):
            for leftover in self._root.glob(pattern):
                shutil.rmtree(leftover, ignore_errors=True)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
