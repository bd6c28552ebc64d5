"""Stores the artefacts of model versions: one folder each, written whole or not at all.

<root>/projects/<project key>/<version>/
    model.safetensors, detector.json    the detector
    card.json                           the model card: data, metrics, settings
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


class VersionMissing(LookupError):
    """The store holds no such version; the text names the version and the remedy."""


class StoreUnavailable(OSError):
    """The store cannot be used; the text names the setting, the cause and the remedy."""


class ArtefactStore:
    """Stores model versions in a folder.

    Args:
        root: the folder; `MODEL_DIR` unless the admin names another.
    """

    def __init__(self, root: Path) -> None:
        self._root = root / "projects"

    def folder(self, project_key: str, version: str) -> Path:
        """Names the folder of a version, whether or not the version exists.

        Raises:
            ValueError: a name that leads out of the store.
        """
        for name in (project_key, version):
            if not name or name.startswith(".") or "/" in name or "\\" in name or "\0" in name:
                raise ValueError(f"{name!r} cannot name a folder of the artefact store")
        return self._root / project_key / version

    def publish(
        self,
        project_key: str,
        version: str,
        write: Callable[[Path], None],
        card: dict[str, Any],
    ) -> Path:
        """Writes a new version into a temporary folder, and renames that once it is on disk.

        Args:
            project_key: the project's key.
            version: name of the new version.
            write: writes the artefact's files into the folder that it receives.
            card: the model card, JSON.

        Returns:
            The version's folder.

        Raises:
            FileExistsError: the version exists; versions never change.
            OSError: the files cannot be written (disk full, read-only); nothing is left behind.
        """
        target = self.folder(project_key, version)
        if target.exists():
            raise FileExistsError(f"version {version} of project {project_key} exists already")
        with temporary_folder(target.parent, ".building-") as building:
            write(building)
            (building / "card.json").write_text(json.dumps(card, indent=1), encoding="utf-8")
            self._commit(project_key, version, building)
        return target

    def _commit(self, project_key: str, version: str, building: Path) -> None:
        """Makes visible the version whose files lie in a temporary folder."""
        move_into_place(building, self.folder(project_key, version))

    def check(self, project_key: str, version: str) -> None:
        """Checks that a version exists, without fetching its files.

        Raises:
            VersionMissing: no such version exists.
            StoreUnavailable: the store cannot be asked.
        """
        self.existing(project_key, version)

    def existing(self, project_key: str, version: str) -> Path:
        """Finds the folder of a version that must exist.

        Raises:
            VersionMissing: no such version exists.
            StoreUnavailable: the version's files cannot be fetched.
        """
        folder = self.folder(project_key, version)
        if not is_complete(folder):
            raise VersionMissing(
                f"version {version} is not in {folder.parent}: restore the folder, "
                "or roll back to another version"
            )
        return folder

    def remove(self, project_key: str, version: str) -> None:
        """Deletes a version. The folder is renamed first, so that nobody sees half of a version."""
        folder = self.folder(project_key, version)
        if folder.exists():
            doomed = Path(tempfile.mkdtemp(prefix=".removing-", dir=folder.parent))
            folder.rename(doomed / version)
            shutil.rmtree(doomed)

    def sweep(self, project_key: str) -> None:
        """Deletes unfinished folders that killed processes left of a project.

        Call it only while no training of the project runs.
        """
        for pattern in (".building-*", ".removing-*"):
            for leftover in (self._root / project_key).glob(pattern):
                shutil.rmtree(leftover, ignore_errors=True)

    def remove_unrecorded(
        self, project_key: str, recorded: Collection[str], since: datetime
    ) -> list[str]:
        """Deletes the versions of a project that no record names: their trainings were killed.

        Call it only while no training of the project runs.

        Args:
            project_key: the project's key.
            recorded: names of the versions to keep.
            since: when the project was first recorded. Older versions were made with another
                database, which may still name them, and stay.

        Returns:
            The names of the deleted versions.

        Raises:
            StoreUnavailable: the store cannot be listed.
            OSError: a version cannot be deleted.
        """
        doomed = sorted(
            version
            for version, stored_at in self._stored(project_key).items()
            if version not in recorded and stored_at > since
        )
        for version in doomed:
            self.remove(project_key, version)
        return doomed

    def _stored(self, project_key: str) -> dict[str, datetime]:
        """Lists the versions of a project, each with the time when it was stored."""
        return {
            card.parent.name: datetime.fromtimestamp(card.stat().st_mtime, UTC)
            for card in (self._root / project_key).glob("[!.]*/card.json")
        }

    def probe(self) -> str:
        """Checks that versions can be stored, for `doctor`.

        Returns:
            A sentence that says where versions are stored.

        Raises:
            StoreUnavailable: versions cannot be stored; the text says why, and what to do.
        """
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._root):
                pass
        except OSError as error:
            raise StoreUnavailable(
                f"ML_BACKEND_ARTEFACTS_URL: {self._root} cannot be written to ({error.strerror}): "
                "name a folder that this user can write to"
            ) from error
        return f"model versions are stored in {self._root}"


def is_complete(folder: Path) -> bool:
    """Tells whether a folder holds a version: the rename makes only complete folders visible."""
    return (folder / "card.json").is_file()


@contextmanager
def temporary_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """Makes a folder beside a version's own, and deletes it at the end unless it was moved."""
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def move_into_place(folder: Path, target: Path) -> None:
    """Renames a folder after flushing its files to disk; a power cut leaves all or nothing.

    Raises:
        OSError: the files cannot be flushed, or the target exists.
    """
    for path in [*folder.iterdir(), folder]:
        _flush(path)
    folder.chmod(0o755)
    folder.rename(target)
    _flush(target.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
