"""Writes a labelled data set in any registered format."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from ml_backend.datasets.folder import IMAGE_SUFFIXES
from ml_backend.datasets.formats.base import AnnotatedImage, Annotations, DatasetFormat
from ml_backend.datasets.types import DatasetError, LabelledData
from ml_backend.detection.decoding import UndecodableImage, image_size
from ml_backend.detection.types import Sample
from ml_backend.extensions import DATASET_FORMATS


def write_dataset(dataset: LabelledData, folder: Path, format: str) -> None:
    """Writes a labelled data set, and copies its image files.

    `read_dataset` reads the same samples from the folder. An image keeps its path below `images/`
    (Pascal VOC: `JPEGImages/`); where two images differ only in their suffix, or in the case of
    letters, a number is added to the name of the second one.

    Args:
        dataset: the data set.
        folder: an empty folder, or a path at which there is nothing.
        format: a name of `DATASET_FORMATS`: `coco`, `label_studio`, `yolo`, `pascal_voc`.

    Raises:
        UnknownExtension: there is no such format.
        DatasetError: the folder is not empty, or an image cannot be read or has no suffix.
    """
    writer: DatasetFormat = DATASET_FORMATS.load(format)()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise DatasetError(f"{folder} is not an empty folder: give a new one")
    images = []
    places = _places(dataset.samples, PurePosixPath(writer.image_folder))
    for sample, place in zip(dataset.samples, places, strict=True):
        target = folder / place
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copyfile(sample.image, target)
            size = image_size(target, max_pixels=None)
        except (UndecodableImage, OSError) as error:
            raise DatasetError(
                f"{sample.image} cannot be read ({error}): the data set is not written completely"
            ) from error
        boxes = [
            (dataset.labels[label], *map(float, box))
            for label, box in zip(sample.labels.tolist(), sample.boxes.tolist(), strict=True)
        ]
        images.append(AnnotatedImage(place, boxes, size=size))
    folder.mkdir(parents=True, exist_ok=True)
    writer.write(Annotations(dataset.labels, images), folder)


def _places(samples: Iterable[Sample], image_folder: PurePosixPath) -> list[PurePosixPath]:
    """Makes a path for each image file; no two are equal without their suffix."""
    taken: set[str] = set()
    places: list[PurePosixPath] = []
    for sample in samples:
        place = _place(sample, image_folder)
        stem, number = place.stem, 2
        while str(place.with_suffix("")).casefold() in taken:
            place = place.with_name(f"{stem}-{number}{place.suffix}")
            number += 1
        taken.add(str(place.with_suffix("")).casefold())
        places.append(place)
    return places


def _place(sample: Sample, image_folder: PurePosixPath) -> PurePosixPath:
    # A reader ignores hidden files, and no part may lead out of the folder.
    parts = [part.lstrip(".") or "_" for part in PurePosixPath(sample.key).parts if part != "/"]
    if len(parts) > 1 and parts[0].lower() in {"images", "jpegimages"}:
        del parts[0]
    place = image_folder.joinpath(*parts)
    if place.suffix.lower() not in IMAGE_SUFFIXES:
        place = place.with_name(f"{place.name}{sample.image.suffix}")
    if place.suffix.lower() not in IMAGE_SUFFIXES:
        raise DatasetError(
            f"{sample.image} must have the suffix of an image: {', '.join(sorted(IMAGE_SUFFIXES))}"
        )
    return place
