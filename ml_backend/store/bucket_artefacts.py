"""Stores the artefacts of model versions in a bucket (S3, Google Cloud Storage), through fsspec.

<url>/projects/<project key>/<version>/
    <files of the version>
    manifest.json       size and SHA-256 of every file, uploaded last: without it, no version

Each host keeps the versions that it has used in a cache below its own `MODEL_DIR`, in the layout
of `ArtefactStore`; a cached version is read without asking the bucket.

An upload of more than 100 MB has several parts; parts of a killed upload are invisible, and only a
lifecycle rule of the bucket ("abort incomplete multipart uploads") deletes them.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import json
import logging
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ml_backend.settings import SettingsError
from ml_backend.store.artefacts import (
    ArtefactStore,
    StoreUnavailable,
    VersionMissing,
    is_complete,
    move_into_place,
    temporary_folder,
)

_log = logging.getLogger(__name__)

ABANDONED_AFTER = 24 * 3600.0
"""Seconds after which an unfinished upload or download counts as one of a killed process. No lock
spans hosts, so only time tells it from the work of another host."""
_SETTING = "ML_BACKEND_ARTEFACTS_URL"
_MANIFEST = "manifest.json"
_TO_REMOVE = ".to-remove-"


@dataclass(frozen=True, slots=True)
class _Scheme:
    """Describes how fsspec opens one kind of bucket.

    Attributes:
        package: the library that implements the kind.
        extra: our extra that installs the package.
        options: arguments of its file system.
        credentials: variables that hold its credentials.
        address: what decides where it is looked for.
    """

    package: str
    extra: str
    options: dict[str, Any]
    credentials: str
    address: str


_SCHEMES = {
    "s3": _Scheme(
        "s3fs",
        "s3",
        # A listing may change by what other hosts do. By default botocore waits for minutes.
        {
            "use_listings_cache": False,
            "config_kwargs": {
                "connect_timeout": 5,
                "read_timeout": 60,
                "retries": {"max_attempts": 2},
            },
        },
        "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        "the network and AWS_ENDPOINT_URL",
    ),
    "gs": _Scheme(
        "gcsfs",
        "gs",
        {"use_listings_cache": False},
        "GOOGLE_APPLICATION_CREDENTIALS",
        "the network",
    ),
}


class BucketArtefactStore(ArtefactStore):
    """Stores model versions in a bucket, and caches those that this host uses.

    Args:
        url: `s3://bucket/prefix` or `gs://bucket/prefix`.
        model_dir: this host's `MODEL_DIR`: holds the cache, and versions of the time before the
            bucket, which are uploaded when they are first used.
        abandoned_after: see `ABANDONED_AFTER`.

    Raises:
        SettingsError: the library of this kind of bucket is not installed.
    """

    def __init__(
        self, url: str, model_dir: Path, *, abandoned_after: float = ABANDONED_AFTER
    ) -> None:
        self._url = url
        self._scheme = _SCHEMES[url.partition("://")[0]]
        if importlib.util.find_spec(self._scheme.package) is None:
            raise SettingsError(
                f"{_SETTING}: {url} needs the package {self._scheme.package}: "
                f"`pip install 'label-studio-detector-backend[{self._scheme.extra}]'`"
            )
        # Another bucket is another store: its versions are not those of this cache.
        name = hashlib.sha256(url.encode()).hexdigest()[:12]
        super().__init__(model_dir / "artefact-cache" / name)
        self._before = ArtefactStore(model_dir)
        self._abandoned_after = abandoned_after

    def _commit(self, project_key: str, version: str, building: Path) -> None:
        if self._manifest(project_key, version) is not None:
            raise FileExistsError(f"version {version} of project {project_key} exists already")
        self._upload(building, project_key, version)
        super()._commit(project_key, version, building)

    def check(self, project_key: str, version: str) -> None:
        """Checks that a version exists, without fetching its files; see `ArtefactStore`."""
        if is_complete(self.folder(project_key, version)):
            return
        if self._manifest(project_key, version) is None and not is_complete(
            self._before.folder(project_key, version)
        ):
            raise self._missing(project_key, version)

    def existing(self, project_key: str, version: str) -> Path:
        """Finds the cached folder of a version; downloads the version where it is not cached.

        Raises:
            VersionMissing: the bucket holds no such version, or a damaged one.
            StoreUnavailable: the bucket cannot be read.
            OSError: the cache cannot be written.
        """
        folder = self.folder(project_key, version)
        if is_complete(folder):
            return folder
        manifest = self._manifest(project_key, version)
        if manifest is not None:
            self._download(project_key, version, manifest)
            self._drop_pruned(project_key)
            return folder
        before = self._before.folder(project_key, version)
        if not is_complete(before):
            raise self._missing(project_key, version)
        _log.info("project %s: %s is uploaded to %s", project_key, version, self._url)
        self._upload(before, project_key, version)
        with temporary_folder(folder.parent, ".downloading-") as copy:
            shutil.copytree(before, copy, dirs_exist_ok=True)
            _move_unless_there(copy, folder)
        return folder

    def remove(self, project_key: str, version: str) -> None:
        """Deletes a version from the bucket and from this host's cache.

        Other hosts drop it from their caches at their next download or training of the project. If
        the bucket cannot be reached, this host's next training of the project deletes the version.
        """
        folder = self.folder(project_key, version)
        folder.parent.mkdir(parents=True, exist_ok=True)
        note = folder.parent / f"{_TO_REMOVE}{version}"
        note.touch()
        super().remove(project_key, version)
        self._before.remove(project_key, version)
        try:
            self._remove_from_bucket(project_key, version)
        except StoreUnavailable as error:
            _log.warning("%s stays in the bucket until the next training: %s", version, error)
        else:
            note.unlink(missing_ok=True)

    def sweep(self, project_key: str) -> None:
        """Deletes unfinished files of killed processes, and cached versions that others pruned.

        Half uploads and downloads are deleted only once they are a day old: other hosts may be at
        work. Logs a warning where the bucket cannot be reached: cached versions serve without it.
        """
        super().sweep(project_key)
        oldest = time.time() - self._abandoned_after
        cache = self._root / project_key
        for download in cache.glob(".downloading-*"):
            if download.stat().st_mtime < oldest:
                shutil.rmtree(download, ignore_errors=True)
        try:
            for note in cache.glob(f"{_TO_REMOVE}*"):
                self._remove_from_bucket(project_key, note.name.removeprefix(_TO_REMOVE))
                note.unlink()
            self._sweep_bucket(project_key, oldest)
            if cache.is_dir():
                self._drop_pruned(project_key)
        except StoreUnavailable as error:
            _log.warning("%s", error)

    def probe(self) -> str:
        """Checks that the bucket can be written, read and deleted from; see `ArtefactStore`."""
        content = secrets.token_bytes(16)
        with self._reached() as (files, root):
            path = f"{root}/.probe-{content.hex()}"
            files.pipe_file(path, content)
            read = files.cat_file(path)
            files.rm_file(path)
        if read != content:
            raise StoreUnavailable(f"{_SETTING}: {self._url} does not return what was written")
        return f"model versions are stored in {self._url}, and cached in {self._root}"

    @contextmanager
    def _reached(self) -> Iterator[tuple[Any, str]]:
        """Opens the bucket: fsspec's file system, and the path of the store in it.

        Raises:
            StoreUnavailable: whatever its library raises inside.
        """
        try:
            # Takes a second to import. The instance is fsspec's own, one for each process.
            from fsspec.core import url_to_fs

            yield url_to_fs(self._url, **self._scheme.options)
        except Exception as error:
            # The libraries below raise errors of their own kinds, which are not importable here.
            if isinstance(error, OSError) and error.errno in {
                errno.ENOSPC,
                errno.EROFS,
                errno.EDQUOT,
            }:
                # This host's disk.
                raise
            raise StoreUnavailable(self._explained(error)) from error

    def _explained(self, error: Exception) -> str:
        cause = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, FileNotFoundError):
            return f"{_SETTING}: {self._url}: {cause}: create the bucket, or name another"
        if isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
            return (
                f"{_SETTING}: {self._url}: access is denied ({cause}): check the credentials "
                f"in {self._scheme.credentials}, which must allow to list, read, write and delete"
            )
        return f"{_SETTING}: {self._url} cannot be reached ({cause}): check {self._scheme.address}"

    def _missing(self, project_key: str, version: str) -> VersionMissing:
        return VersionMissing(
            f"version {version} is not in {self._url}/projects/{project_key}: restore it there, or "
            "roll back to another version"
        )

    def _manifest(self, project_key: str, version: str) -> dict[str, dict[str, Any]] | None:
        """Reads the manifest: size and SHA-256 by file name; None where there is no version."""
        self.folder(project_key, version)
        with self._reached() as (files, root):
            try:
                content = files.cat_file(f"{root}/projects/{project_key}/{version}/{_MANIFEST}")
            except FileNotFoundError:
                return None
        manifest: dict[str, dict[str, Any]] = json.loads(content)["files"]
        return manifest

    def _upload(self, folder: Path, project_key: str, version: str) -> None:
        manifest = {
            path.name: {"size": path.stat().st_size, "sha256": _sha256(path)}
            for path in sorted(folder.iterdir())
        }
        with self._reached() as (files, root):
            target = f"{root}/projects/{project_key}/{version}"
            for name in manifest:
                files.put_file(str(folder / name), f"{target}/{name}")
            # From here on the version exists.
            content = json.dumps({"files": manifest}, indent=1).encode()
            files.pipe_file(f"{target}/{_MANIFEST}", content)

    def _download(
        self, project_key: str, version: str, manifest: dict[str, dict[str, Any]]
    ) -> None:
        target = self.folder(project_key, version)
        with temporary_folder(target.parent, ".downloading-") as folder:
            for name, expected in manifest.items():
                if Path(name).name != name:
                    raise VersionMissing(f"the manifest of version {version} names {name!r}")
                path = folder / name
                with self._reached() as (files, root), suppress(FileNotFoundError):
                    files.get_file(f"{root}/projects/{project_key}/{version}/{name}", str(path))
                if not path.exists():
                    # Another host has pruned the version meanwhile, or somebody deleted the file.
                    raise self._missing(project_key, version)
                if _sha256(path) != expected["sha256"]:
                    raise VersionMissing(
                        f"version {version} in {self._url} is damaged: {name} is not the file that "
                        "was uploaded: restore it, or roll back to another version"
                    )
            _move_unless_there(folder, target)

    def _remove_from_bucket(self, project_key: str, version: str) -> None:
        with self._reached() as (files, root):
            folder = f"{root}/projects/{project_key}/{version}"
            found = files.find(folder)
            # Without its manifest a version is gone, and the rest is a half upload.
            for path in sorted(found, key=lambda path: not path.endswith(f"/{_MANIFEST}")):
                files.rm_file(path)

    def _stored(self, project_key: str) -> dict[str, datetime]:
        """Lists the versions of a project, cached, uploaded or half uploaded."""
        with self._reached() as (files, root):
            uploaded = {
                version: max(files.modified(path) for path in paths)
                for version, paths in _uploads(files, root, project_key).items()
            }
        return {**super()._stored(project_key), **uploaded}

    def _sweep_bucket(self, project_key: str, oldest: float) -> None:
        moment = datetime.fromtimestamp(oldest, UTC)
        with self._reached() as (files, root):
            for paths in _uploads(files, root, project_key).values():
                if any(path.endswith(f"/{_MANIFEST}") for path in paths):
                    continue
                if max(files.modified(path) for path in paths) < moment:
                    for path in paths:
                        files.rm_file(path)

    def _drop_pruned(self, project_key: str) -> None:
        """Deletes the cached versions that are no longer in the bucket.

        A project without any version in the bucket keeps its cache, which may be the last copy.
        """
        with self._reached() as (files, root):
            found = files.find(f"{root}/projects/{project_key}")
        stored = {path.split("/")[-2] for path in found if path.endswith(f"/{_MANIFEST}")}
        if not stored:
            return
        for folder in (self._root / project_key).iterdir():
            if is_complete(folder) and folder.name not in stored:
                super().remove(project_key, folder.name)


def _uploads(files: Any, root: str, project_key: str) -> dict[str, list[str]]:
    """Lists the files of a project in the bucket, by version."""
    found: dict[str, list[str]] = {}
    for path in files.find(f"{root}/projects/{project_key}"):
        found.setdefault(path.split("/")[-2], []).append(path)
    return found


def _move_unless_there(folder: Path, target: Path) -> None:
    """Moves a folder to its place; another process of this host may have been first."""
    try:
        move_into_place(folder, target)
    except OSError as error:
        if error.errno not in {errno.ENOTEMPTY, errno.EEXIST} or not is_complete(target):
            raise


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
