"""The contract of a data set format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import ClassVar

from ml_backend.datasets.folder import Folder
from ml_backend.datasets.types import Omissions

Box = tuple[str, float, float, float, float]
"""Label's name, x1, y1, x2, y2."""


@dataclass(frozen=True, slots=True)
class AnnotatedImage:
    """An image and its boxes, as a data set states them.

    Attributes:
        image: path of the image file below the data set's folder.
        boxes: its boxes, in pixels of the upright image, or as fractions of it.
        fractions: whether the boxes are fractions.
        size: width and height in pixels, if the data set states them; may be anything that its file
            holds there.
    """

    image: PurePosixPath
    boxes: list[Box]
    fractions: bool = False
    size: tuple[object, object] | None = None


@dataclass(frozen=True, slots=True)
class Annotations:
    """The annotations of a data set.

    Attributes:
        names: names of the labels, in their order.
        images: the annotated images; one without a box is annotated as empty.
    """

    names: Sequence[str]
    images: Iterable[AnnotatedImage]


class DatasetFormat(ABC):
    """Reads and writes the annotations of data sets in one format.

    Image files are not a format's concern: a reader looks them up in the `Folder`, a writer finds
    them in place.
    """

    description: ClassVar[str]
    """Files of a data set in this format, for the message that no data set was found."""
    file_suffixes: ClassVar[frozenset[str]] = frozenset()
    """Suffixes, in lower case, of a single file that may hold a whole data set in this format."""
    image_folder: ClassVar[str] = "images"
    """Folder of the image files in a data set that is written."""

    @abstractmethod
    def recognises(self, folder: Folder) -> bool:
        """Says whether a folder holds a data set in this format.

        Args:
            folder: the folder; if `folder.file` is set, only that file counts.

        Raises:
            DatasetError: it does, and cannot be read.
        """

    @abstractmethod
    def read(self, folder: Folder, omissions: Omissions) -> Annotations:
        """Reads the annotations of a folder that holds a data set in this format.

        Args:
            folder: the folder.
            omissions: receives everything that is left out.

        Raises:
            DatasetError: they cannot be read.
        """

    @abstractmethod
    def write(self, annotations: Annotations, folder: Path) -> None:
        """Writes annotations into a folder that holds the image files already.

        Args:
            annotations: boxes are in pixels of the upright image; each image has its size, and a
                path without suffix that no other image has.
            folder: the data set's folder.
        """
