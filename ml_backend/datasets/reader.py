"""Reads a labelled data set in any registered format."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from ml_backend.datasets.folder import ANNOTATION_FOLDERS, MISSING, Folder
from ml_backend.datasets.formats.base import AnnotatedImage, Annotations, DatasetFormat
from ml_backend.datasets.types import DatasetError, LabelledData, Omissions
from ml_backend.detection.decoding import UndecodableImage, image_size
from ml_backend.detection.types import FloatArray, Sample
from ml_backend.extensions import DATASET_FORMATS

_log = logging.getLogger(__name__)


def read_dataset(path: Path, on_warning: Callable[[str], None] = _log.warning) -> LabelledData:
    """Reads a labelled data set; its splits become one.

    The first format of `DATASET_FORMATS` that recognises the folder reads it: COCO, an export of
    Label Studio, YOLO, Pascal VOC, then formats of other packages. Image files may be anywhere
    below the folder.

    Boxes in pixels are taken as pixels of the upright image (EXIF applied), and cut off at its
    edges. Only the head of an image file is read: damage further on is not noticed here.

    Args:
        path: the data set's folder, or the single file that holds it.
        on_warning: receives a sentence about the first of each kind that is left out or doubtful.

    Raises:
        DatasetError: there is no data set that can be read, or no box in it.
        ExtensionError: a registered format cannot be imported.
    """
    path = path.absolute()
    formats = [DATASET_FORMATS.load(name)() for name in DATASET_FORMATS]
    folder = _folder(path, formats)
    omissions = Omissions(on_warning)
    annotations = _annotations(path, folder, formats, omissions)
    labelled: dict[PurePosixPath, _Labelled] = {}
    for annotated in annotations.images:
        if annotated.image in labelled:
            omissions.add("the image is annotated before: the first counts", annotated.image)
            continue
        one = _labelled(annotated, folder.root, omissions)
        if one is not None:
            labelled[annotated.image] = one
    used = {name for one in labelled.values() for name in one.names}
    if not used:
        raise DatasetError(_nothing_usable(path, len(labelled), omissions))
    labels = tuple(name for name in dict.fromkeys(annotations.names) if name in used)
    position = {name: i for i, name in enumerate(labels)}
    samples = tuple(
        Sample(
            key=key.as_posix(),
            image=folder.root / key,
            boxes=one.boxes,
            labels=np.array([position[name] for name in one.names], np.int64),
        )
        for key, one in sorted(labelled.items())
    )
    return LabelledData(labels, samples, dict(omissions.counts))


@dataclass(frozen=True, slots=True)
class _Labelled:
    """An image whose file can be read: its boxes in pixels, and the names of their labels."""

    boxes: FloatArray
    names: list[str]


def _folder(path: Path, formats: list[DatasetFormat]) -> Folder:
    if not path.exists():
        raise DatasetError(f"there is no {path}: give the folder of a data set, or its JSON file")
    if path.is_dir():
        return Folder(path)
    if not any(path.suffix.lower() in one.file_suffixes for one in formats):
        raise DatasetError(
            f"{path} is neither a folder nor a JSON file: give the data set's folder (an archive "
            "must be unpacked first)"
        )
    root = path.parent
    if root.name.lower() in ANNOTATION_FOLDERS:
        root = root.parent
    return Folder(root, PurePosixPath(path.relative_to(root).as_posix()))


def _annotations(
    path: Path, folder: Folder, formats: list[DatasetFormat], omissions: Omissions
) -> Annotations:
    asked = formats
    if folder.file is not None:
        asked = [one for one in formats if folder.file.suffix.lower() in one.file_suffixes]
    for one in asked:
        if one.recognises(folder):
            found = one.read(folder, omissions)
            for file in folder.unreadable_json:
                omissions.add("the file is no valid JSON", file)
            return found
    for error in folder.unreadable_json.values():
        raise error
    described = [one.description for one in asked]
    if folder.file is not None:
        raise DatasetError(f"{path} is neither {' nor '.join(described)}: export it as one of them")
    raise DatasetError(
        f"{path} holds no data set: looked for {', '.join(described)}; give the folder that holds "
        "one of them"
    )


def _nothing_usable(path: Path, images: int, omissions: Omissions) -> str:
    if not omissions.counts:
        return f"{path} holds {images} images and no box: give a data set with boxes"
    reason, count = omissions.counts.most_common(1)[0]
    remedy = "put the image files below its folder" if reason == MISSING else "export it again"
    return f"{path} holds no box that can be used ({count} times: {reason}): {remedy}"


def _labelled(annotated: AnnotatedImage, root: Path, omissions: Omissions) -> _Labelled | None:
    try:
        width, height = image_size(root / annotated.image, max_pixels=None)
    except (UndecodableImage, OSError):
        omissions.add("the image file cannot be read", annotated.image)
        return None
    stated = annotated.size
    if stated is not None and all(map(_positive, stated)) and stated != (width, height):
        omissions.warn(
            f"the annotations say {stated[0]} x {stated[1]} pixels, but upright it has {width} x "
            f"{height}: boxes are taken as pixels of the upright image",
            annotated.image,
        )
    corners = np.array([box[1:] for box in annotated.boxes], np.float64).reshape(-1, 4)
    names = [box[0] for box in annotated.boxes]
    size = np.array([width, height] * 2, np.float64)
    if annotated.fractions:
        corners *= size
    cut = np.clip(corners, 0, size).astype(np.float32)
    kept = (cut[:, 2] > cut[:, 0]) & (cut[:, 3] > cut[:, 1])
    # A difference of up to a pixel is rounding.
    outside = np.abs(corners - cut).max(axis=1, initial=0.0) > 1
    for keep, beyond in zip(kept.tolist(), outside.tolist(), strict=True):
        if not keep:
            omissions.add("a box has no area inside the image", annotated.image)
        elif beyond:
            omissions.add("the part of a box that is outside of the image", annotated.image)
    return _Labelled(cut[kept], [n for n, k in zip(names, kept.tolist(), strict=True) if k])


def _positive(value: object) -> bool:
    return isinstance(value, int | float) and value > 0
