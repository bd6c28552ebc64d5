"""The files of a data set: a listing of its folder, and which image an annotation means."""

from __future__ import annotations

import functools
import json
import os
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ml_backend.datasets.types import DatasetError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"})
ANNOTATION_FOLDERS = frozenset({"annotations", "labels"})
"""Usual names, in lower case, of folders that hold annotations and no images."""
MISSING = "the image file is missing"
_IMAGE_FOLDERS = {"images", "jpegimages"}
_AMBIGUOUS = "several image files have the image's name"


@dataclass(frozen=True, slots=True)
class Scope:
    """The part of a folder in which the images of an annotation file are looked for.

    Attributes:
        base: a folder that is above the images.
        split: names of folders in lower case; if there are any, one of them is above the images.
    """

    base: PurePosixPath
    split: frozenset[str] = frozenset()


class Folder:
    """The files below a folder, in an order that is the same on every machine.

    Hidden files and folders are left out. All paths are relative to the folder.

    Args:
        root: the folder.
        file: the only annotation file to use, where the user names a file and not a folder.

    Attributes:
        files: paths of all files.
        images: paths of the image files.
    """

    def __init__(self, root: Path, file: PurePosixPath | None = None) -> None:
        self.root = root
        self.file = file
        self.files: list[PurePosixPath] = []
        seen: set[str] = set()
        for folder, folders, names in os.walk(root, followlinks=True):
            # A symbolic link may lead back to a folder above it.
            real = os.path.realpath(folder)
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(f for f in folders if not f.startswith((".", "__MACOSX")))
            below = PurePosixPath(Path(folder).relative_to(root).as_posix())
            self.files += [below / name for name in sorted(names) if not name.startswith(".")]
        self.images = [file for file in self.files if file.suffix.lower() in IMAGE_SUFFIXES]
        self._by_name: dict[str, list[PurePosixPath]] = defaultdict(list)
        self._by_stem: dict[str, list[PurePosixPath]] = defaultdict(list)
        for image in self.images:
            self._by_name[image.name].append(image)
            self._by_stem[image.stem].append(image)
        self._folders = {part.lower() for i in self.images for part in i.parts[:-1]}

    @functools.cached_property
    def _parsed_json(
        self,
    ) -> tuple[list[tuple[PurePosixPath, Any]], dict[PurePosixPath, DatasetError]]:
        contents: list[tuple[PurePosixPath, Any]] = []
        unreadable: dict[PurePosixPath, DatasetError] = {}
        for file in [self.file] if self.file else self.files:
            near = len(file.parts) < 3 or file.parts[1:-1] == ("annotations",)
            if file.suffix.lower() != ".json" or not near:
                continue
            path = self.root / file
            try:
                contents.append((file, json.loads(path.read_bytes())))
            except (OSError, ValueError, RecursionError) as error:
                unreadable[file] = DatasetError(
                    f"{path} is no valid JSON ({error}): export it again"
                )
        return contents, unreadable

    @property
    def json_contents(self) -> list[tuple[PurePosixPath, Any]]:
        """Reads the JSON files at most one folder down, or in its `annotations`."""
        return self._parsed_json[0]

    @property
    def unreadable_json(self) -> dict[PurePosixPath, DatasetError]:
        """Lists the JSON files that cannot be parsed, with the error of each."""
        return self._parsed_json[1]

    def scope_of(self, annotations: PurePosixPath) -> Scope:
        """Finds where the images of an annotation file may be: beside it, or beside its folder.

        Without a scope, an image that is missing in one split could be taken from another one.
        """
        folders = annotations.parts[:-1]
        lower = [part.lower() for part in folders]
        at = min((i for i, part in enumerate(lower) if part in ANNOTATION_FOLDERS), default=None)
        split = set() if at is None else set(lower[at + 1 :])
        if annotations.suffix.lower() == ".json":
            split.update(re.split(r"[^0-9a-z]+", annotations.stem.lower()))
        split &= self._folders - ANNOTATION_FOLDERS
        return Scope(PurePosixPath(*folders[:at]), frozenset(split))

    def image(self, name: str, scope: Scope, stem: str = "") -> PurePosixPath | str:
        """Finds the image file that an annotation means.

        Args:
            name: the image's name or path in the annotation. The file of just that path below
                `scope.base` comes first, then the file whose folders agree best.
            scope: where it may be.
            stem: a name without suffix, used if no file has the name.

        Returns:
            The path of the file, or the reason why there is none.
        """
        wanted = PurePosixPath(name.replace("\\", "/"))
        named = self._by_name.get(wanted.name) or self._by_stem.get(stem, [])
        found = [f for f in named if f.is_relative_to(scope.base)]
        if scope.split:
            found = [f for f in found if scope.split & {p.lower() for p in f.parts[:-1]}]
        if not found:
            return MISSING
        if scope.base / wanted in found:
            return scope.base / wanted

        def rank(file: PurePosixPath) -> tuple[int, bool, bool]:
            agreeing = 0
            for ours, theirs in zip(reversed(file.parts), reversed(wanted.parts), strict=False):
                if ours != theirs:
                    break
                agreeing += 1
            return (agreeing, file.parent == scope.base, file.parent.name.lower() in _IMAGE_FOLDERS)

        best, *others = sorted(found, key=rank, reverse=True)
        if others and rank(others[0]) == rank(best):
            return _AMBIGUOUS
        return best
