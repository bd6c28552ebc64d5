"""A data set format of another package, for tests: one line for each box in `boxes.csv`."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from ml_backend.datasets.folder import Folder
from ml_backend.datasets.formats.base import AnnotatedImage, Annotations, DatasetFormat
from ml_backend.datasets.types import Omissions

_FILE = PurePosixPath("boxes.csv")


class Csv(DatasetFormat):
    """Lines of path, label and corners in pixels; one without a label marks an empty image."""

    description = "CSV (boxes.csv)"

    def recognises(self, folder: Folder) -> bool:
        """Says whether there is a `boxes.csv`."""
        return _FILE in folder.files

    def read(self, folder: Folder, omissions: Omissions) -> Annotations:
        """Reads the lines."""
        images: dict[PurePosixPath, AnnotatedImage] = {}
        with (folder.root / _FILE).open(newline="") as file:
            for path, label, *corners in csv.reader(file):
                image = PurePosixPath(path)
                one = images.setdefault(image, AnnotatedImage(image, []))
                if label:
                    x1, y1, x2, y2 = map(float, corners)
                    one.boxes.append((label, x1, y1, x2, y2))
        names = sorted({box[0] for one in images.values() for box in one.boxes})
        return Annotations(names, images.values())

    def write(self, annotations: Annotations, folder: Path) -> None:
        """Writes the lines."""
        with (folder / _FILE).open("w", newline="") as file:
            csv.writer(file).writerows(_lines(annotations.images))


def _lines(images: Iterable[AnnotatedImage]) -> Iterable[tuple[object, ...]]:
    for one in images:
        for box in one.boxes or [("", 0, 0, 0, 0)]:
            yield one.image, *box
