"""Labelled data sets, as people have them: COCO, Pascal VOC, YOLO, exports of Label Studio.

Which library reads what:
    - VOC: torchvision's `parse_voc_xml`, behind defusedxml.
    - Label Studio: `read_regions`, the reader that trainings use; an export has no label config, so
      its controls are derived from its results.
    - COCO and YOLO: short readers here. label-studio-sdk's converters write files and print
      advice; the one for COCO fails on crowds and on images without a size, the one for YOLO reads
      polygons as boxes and knows no splits. faster-coco-eval's index of a COCO file, supervision's
      and globox's loaders stop at the first bad entry instead of counting it; supervision would
      bring FFmpeg besides, and decodes every image of a VOC data set.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.etree.ElementTree import ParseError

import numpy as np
import yaml
from defusedxml import DefusedXmlException
from defusedxml.ElementTree import fromstring
from PIL import ExifTags, Image
from torchvision.datasets import VOCDetection

from ml_backend.detection.decoding import FORMATS
from ml_backend.detection.types import FloatArray, Sample
from ml_backend.label_studio.label_config import BoxControl, Label
from ml_backend.label_studio.regions import read_regions

_log = logging.getLogger(__name__)

_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"}
_ANNOTATION_FOLDERS = {"annotations", "labels"}
_IMAGE_FOLDERS = {"images", "jpegimages"}
_MISSING = "the image file is missing"
_AMBIGUOUS = "several image files have the image's name"
_NO_BOX = "an object has no name, or no bndbox of four numbers"

_Box = tuple[str, float, float, float, float]
"""Label, x1, y1, x2, y2."""


class DatasetError(ValueError):
    """A data set cannot be read; the text says what was looked for, and what helps."""


@dataclass(frozen=True, slots=True)
class LabelledData:
    """A labelled data set.

    Attributes:
        labels: names of the labels that have a box; a sample's labels are indices into it. In the
            order of the data set where it declares one (COCO, YOLO), or else by name.
        samples: its images, by key: the image file's path below the data set's folder. An image
            that is annotated as empty is one, too.
        left_out: why something was left out, and how often.
    """

    labels: tuple[str, ...]
    samples: tuple[Sample, ...]
    left_out: dict[str, int]


def read_dataset(path: Path, on_warning: Callable[[str], None] = _log.warning) -> LabelledData:
    """Reads a labelled data set; its splits become one.

    Looked for, in this order: COCO (`annotations.json`, `_annotations.coco.json`,
    `annotations/*.json`, each also in the folders of splits), an export of Label Studio as JSON,
    YOLO (`data.yaml` or `classes.txt`, `images/` and `labels/`), Pascal VOC (`Annotations/*.xml`,
    or XML beside the images). Image files may lie anywhere below the folder.

    Boxes in pixels are taken as pixels of the upright image (EXIF applied), and cut at its edges.
    Of an image file only the head is read: one that is damaged further on is not noticed here.

    Args:
        path: the data set's folder, or its JSON file.
        on_warning: told a sentence about the first of each kind that is left out or doubtful.

    Raises:
        DatasetError: there is no data set that can be read, or no box in it.
    """
    path = path.absolute()
    if not path.exists():
        raise DatasetError(f"there is no {path}: give the folder of a data set, or its JSON file")
    if path.is_file() and path.suffix.lower() != ".json":
        raise DatasetError(
            f"{path} is neither a folder nor a JSON file: give the data set's folder (an archive "
            "must be unpacked first)"
        )
    root = path if path.is_dir() else path.parent
    if path.is_file() and root.name.lower() in _ANNOTATION_FOLDERS:
        root = root.parent
    files = _Files(root)
    heard = _Heard(on_warning)
    found = _annotated(path, files, heard)
    pictures: dict[PurePosixPath, _Picture] = {}
    for annotated in found.images:
        if annotated.image in pictures:
            heard.leave_out("the image is annotated before: the first counts", annotated.image)
            continue
        picture = _picture(annotated, root, heard)
        if picture is not None:
            pictures[annotated.image] = picture
    used = {name for picture in pictures.values() for name in picture.names}
    if not used:
        raise DatasetError(_nothing_usable(path, len(pictures), heard))
    labels = tuple(name for name in dict.fromkeys(found.names) if name in used)
    position = {name: i for i, name in enumerate(labels)}
    samples = tuple(
        Sample(
            key=key.as_posix(),
            image=root / key,
            boxes=picture.boxes,
            labels=np.array([position[name] for name in picture.names], np.int64),
        )
        for key, picture in sorted(pictures.items())
    )
    return LabelledData(labels, samples, dict(heard.left_out))


@dataclass(frozen=True, slots=True)
class _Annotated:
    """What a data set says of an image.

    Attributes:
        image: path below the root.
        boxes: in pixels, or as fractions of the image.
        fractions: which of them.
        size: width and height in pixels, where the data set says it.
    """

    image: PurePosixPath
    boxes: list[_Box]
    fractions: bool = False
    size: tuple[object, object] | None = None


@dataclass(frozen=True, slots=True)
class _Found:
    """Names of labels in their order, and the annotated images."""

    names: Sequence[str]
    images: Iterable[_Annotated]


@dataclass(frozen=True, slots=True)
class _Picture:
    """An image whose file was looked at: its boxes in pixels, and their labels' names."""

    boxes: FloatArray
    names: list[str]


class _Heard:
    """Counts what is left out; of each kind the first is told."""

    def __init__(self, on_warning: Callable[[str], None]) -> None:
        self.left_out: Counter[str] = Counter()
        self._on_warning = on_warning
        self._told: set[str] = set()

    def leave_out(self, reason: str, where: object) -> None:
        self.left_out[reason] += 1
        self.doubt(reason, where)

    def doubt(self, reason: str, where: object) -> None:
        if reason not in self._told:
            self._told.add(reason)
            self._on_warning(f"{where}: {reason}")


@dataclass(frozen=True, slots=True)
class _Scope:
    """Where the images of an annotation file may lie.

    Attributes:
        base: the folder above them.
        split: if not empty, names of folders of which one is above them, too.
    """

    base: PurePosixPath
    split: frozenset[str] = frozenset()


class _Files:
    """The files below a folder, by path relative to it, in one order on every machine.

    Args:
        root: the folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.all: list[PurePosixPath] = []
        seen: set[str] = set()
        for folder, folders, names in os.walk(root, followlinks=True):
            # A link may lead back to a folder above it.
            real = os.path.realpath(folder)
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(f for f in folders if not f.startswith((".", "__MACOSX")))
            below = PurePosixPath(Path(folder).relative_to(root).as_posix())
            self.all += [below / name for name in sorted(names) if not name.startswith(".")]
        self.images = [file for file in self.all if file.suffix.lower() in _SUFFIXES]
        self._by_name: dict[str, list[PurePosixPath]] = defaultdict(list)
        self._by_stem: dict[str, list[PurePosixPath]] = defaultdict(list)
        for image in self.images:
            self._by_name[image.name].append(image)
            self._by_stem[image.stem].append(image)
        self._folders = {part.lower() for i in self.images for part in i.parts[:-1]}

    def scope_of(self, annotations: PurePosixPath) -> _Scope:
        """Where the images of an annotation file may lie: beside it, or beside its folder.

        Without this an image that is missing in one split could be taken from another.
        """
        folders = annotations.parts[:-1]
        lower = [part.lower() for part in folders]
        at = max((i for i, part in enumerate(lower) if part in _ANNOTATION_FOLDERS), default=None)
        split = set() if at is None else set(lower[at + 1 :])
        if annotations.suffix.lower() == ".json":
            split.update(re.split(r"[^0-9a-z]+", annotations.stem.lower()))
        return _Scope(PurePosixPath(*folders[:at]), frozenset(split & self._folders))

    def image(self, name: str, scope: _Scope, stem: str = "") -> PurePosixPath | str:
        """The image file that an annotation means, or why there is none.

        Args:
            name: as it stands there; of its folders those count that agree.
            scope: where it may lie.
            stem: the name without suffix that serves where there is no such file.
        """
        wanted = PurePosixPath(name.replace("\\", "/"))
        named = self._by_name.get(wanted.name) or self._by_stem.get(stem, [])
        found = [f for f in named if f.is_relative_to(scope.base)]
        if scope.split:
            found = [f for f in found if scope.split & {p.lower() for p in f.parts[:-1]}]
        if not found:
            return _MISSING

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


def _annotated(path: Path, files: _Files, heard: _Heard) -> _Found:
    coco: list[tuple[PurePosixPath, dict[str, Any]]] = []
    tasks: list[Any] = []
    shortened: Path | None = None
    unreadable: list[tuple[PurePosixPath, DatasetError]] = []
    for file in _json_files(path, files):
        try:
            content = _read_json(files.root / file)
        except DatasetError as error:
            unreadable.append((file, error))
            continue
        if isinstance(content, dict) and all(
            isinstance(content.get(key), list) for key in ("images", "annotations", "categories")
        ):
            coco.append((file, content))
        elif _holds(content, "data", "annotations"):
            tasks += content
        elif _holds(content, "annotation_id"):
            shortened = files.root / file
    found: _Found | None = None
    if coco:
        found = _coco(coco, files, heard)
    elif tasks:
        found = _label_studio(tasks, files, heard)
    elif shortened is None and path.is_dir():
        found = _yolo(files, heard) or _voc(files, heard)
    if found is not None:
        for file, _ in unreadable:
            heard.leave_out("the file is no valid JSON", file)
        return found
    if unreadable:
        raise unreadable[0][1]
    if shortened is not None:
        raise DatasetError(
            f"{shortened} is an export as JSON-MIN, which does not tell one control's boxes from "
            "another's: export the project as JSON"
        )
    if path.is_file():
        raise DatasetError(
            f"{path} is neither COCO (images, annotations and categories) nor an export of Label "
            "Studio as JSON (a list of tasks with data and annotations): export it as one of them"
        )
    raise DatasetError(
        f"{path} holds no data set: looked for a JSON file (COCO, or a Label Studio export), "
        "data.yaml or classes.txt with labels (YOLO), and XML files (Pascal VOC); give the "
        "folder that holds them"
    )


def _nothing_usable(path: Path, images: int, heard: _Heard) -> str:
    if not heard.left_out:
        return f"{path} holds {images} images and no box: give a data set with boxes"
    reason, count = heard.left_out.most_common(1)[0]
    remedy = "put the image files below its folder" if reason == _MISSING else "export it again"
    return f"{path} holds no box that can be used ({count} times: {reason}): {remedy}"


def _picture(annotated: _Annotated, root: Path, heard: _Heard) -> _Picture | None:
    try:
        width, height = _upright_size(root / annotated.image)
    except (OSError, SyntaxError, ValueError):
        heard.leave_out("the image file cannot be read", annotated.image)
        return None
    told = annotated.size
    if told is not None and all(map(_positive, told)) and told != (width, height):
        heard.doubt(
            f"the annotations say {told[0]} x {told[1]} pixels, but upright it has {width} x "
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
    # Up to a pixel is rounding.
    outside = np.abs(corners - cut).max(axis=1, initial=0.0) > 1
    for keep, beyond in zip(kept.tolist(), outside.tolist(), strict=True):
        if not keep:
            heard.leave_out("a box has no area inside the image", annotated.image)
        elif beyond:
            heard.leave_out("the part of a box that is outside of the image", annotated.image)
    return _Picture(cut[kept], [n for n, k in zip(names, kept.tolist(), strict=True) if k])


def _upright_size(file: Path) -> tuple[int, int]:
    """Width and height in pixels as `decode_image` would show it, from the file's head."""
    with Image.open(file, formats=FORMATS) as image:
        # Pillow turns a TIFF's size by itself. A PNG's own getexif would decode all of it.
        turned = image.format != "TIFF" and (
            Image.Image.getexif(image).get(ExifTags.Base.Orientation) in {5, 6, 7, 8}
        )
        return (image.height, image.width) if turned else image.size


def _json_files(path: Path, files: _Files) -> list[PurePosixPath]:
    if path.is_file():
        return [PurePosixPath(path.relative_to(files.root).as_posix())]
    return [
        file
        for file in files.all
        if file.suffix.lower() == ".json"
        and (len(file.parts) < 3 or file.parts[1:-1] == ("annotations",))
    ]


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DatasetError(f"{file} is no valid JSON ({error}): export it again") from error


def _holds(content: object, *keys: str) -> bool:
    """Whether it is a list with an object that has all the keys."""
    return isinstance(content, list) and any(
        isinstance(one, dict) and all(key in one for key in keys) for one in content
    )


def _coco(
    contents: Sequence[tuple[PurePosixPath, dict[str, Any]]], files: _Files, heard: _Heard
) -> _Found:
    names: list[str] = []
    images: list[_Annotated] = []
    for file, content in contents:
        scope = files.scope_of(file)
        categories = {
            c["id"]: str(c["name"])
            for c in content["categories"]
            if isinstance(c, dict) and isinstance(c.get("id"), int | str) and "name" in c
        }
        names += categories.values()
        by_id: dict[int | str, _Annotated] = {}
        missing: set[int | str] = set()
        for entry in content["images"]:
            fields = entry if isinstance(entry, dict) else {}
            number, name = fields.get("id"), fields.get("file_name")
            if not isinstance(number, int | str) or not isinstance(name, str):
                heard.leave_out("an image of the list has no id or no file_name", file)
                continue
            image = files.image(name, scope)
            if isinstance(image, str):
                heard.leave_out(image, name)
                missing.add(number)
            else:
                size = (fields.get("width"), fields.get("height"))
                by_id[number] = _Annotated(image, [], size=size)
        for annotation in content["annotations"]:
            box = _coco_box(annotation, categories)
            if isinstance(box, str):
                heard.leave_out(box, file)
            elif annotation["image_id"] in by_id:
                by_id[annotation["image_id"]].boxes.append(box)
            elif annotation["image_id"] not in missing:
                heard.leave_out("an annotation's image is not in the list", file)
        images += by_id.values()
    return _Found(names, images)


def _coco_box(annotation: Any, categories: dict[int | str, str]) -> _Box | str:
    try:
        if annotation.get("iscrowd"):
            return "a crowd (iscrowd) is no single object"
        x, y, width, height = (float(number) for number in annotation["bbox"])
        # Also that they can be looked up.
        known, _ = annotation["category_id"] in categories, hash(annotation["image_id"])
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
        return "an annotation has no image_id, no category_id, or no bbox of four numbers"
    if not known:
        return "an annotation's category is not in the list"
    if not all(map(math.isfinite, (x, y, width, height))):
        return "a box has a coordinate that is not finite"
    return categories[annotation["category_id"]], x, y, x + width, y + height


def _yolo(files: _Files, heard: _Heard) -> _Found | None:
    declared = _yolo_names(files)
    if declared is None:
        return None
    names, pose = declared
    texts = {file for file in files.all if file.suffix.lower() == ".txt"}
    labelled = {f.parent for f in texts if "labels" in map(str.lower, f.parts[:-1])}
    if not labelled:
        # All in one folder, as LabelImg writes it.
        stems = {image.with_suffix("") for image in files.images}
        labelled = {f.parent for f in texts if f.with_suffix("") in stems}
    images: list[_Annotated] = []
    used: set[PurePosixPath] = set()
    for image in files.images:
        text = _yolo_labels(image)
        if text.parent not in labelled:
            # Not a split without objects, but one that nobody has labelled.
            heard.leave_out("the image's folder has no label files", image)
            continue
        used.add(text)
        boxes = []
        if text in texts:
            for line in filter(None, _lines(files.root / text)):
                box = _yolo_box(line, names, pose)
                if isinstance(box, str):
                    heard.leave_out(box, text)
                else:
                    boxes.append(box)
        images.append(_Annotated(image, boxes, fractions=True))
    for text in sorted(texts - used):
        if "labels" in map(str.lower, text.parts[:-1]) and text.name != "classes.txt":
            heard.leave_out(_MISSING, text)
    return _Found(list(names.values()), images)


def _yolo_labels(image: PurePosixPath) -> PurePosixPath:
    """Where an image's labels are: the last `images` of its path is `labels`, or else beside it."""
    parts = list(image.with_suffix(".txt").parts)
    for i in range(len(parts) - 2, -1, -1):
        if parts[i].lower() == "images":
            parts[i] = "labels"
            break
    return PurePosixPath(*parts)


def _yolo_names(files: _Files) -> tuple[dict[int, str], bool] | None:
    """Names of classes by index, and whether keypoints follow the boxes."""
    for file in files.all:
        if len(file.parts) < 3 and file.suffix.lower() in {".yaml", ".yml"}:
            try:
                content = yaml.safe_load((files.root / file).read_bytes())
            except (OSError, ValueError, yaml.YAMLError) as error:
                line = " ".join(str(error).split())
                raise DatasetError(f"{files.root / file} is no valid YAML: {line}") from error
            if not isinstance(content, dict) or not content.get("names"):
                continue
            names = content["names"]
            try:
                pairs = names.items() if isinstance(names, dict) else enumerate(names)
                by_index = {int(index): str(name) for index, name in pairs}
            except (TypeError, ValueError) as error:
                raise DatasetError(
                    f"names in {files.root / file} must be a list, or a mapping from numbers"
                ) from error
            return dict(sorted(by_index.items())), "kpt_shape" in content
    for file in files.all:
        if len(file.parts) < 3 and file.name == "classes.txt":
            return dict(enumerate(_lines(files.root / file))), False
    return None


def _lines(file: Path) -> list[str]:
    text = file.read_text(encoding="utf-8-sig", errors="replace")
    return [line.strip() for line in text.rstrip().splitlines()]


def _yolo_box(line: str, names: dict[int, str], pose: bool) -> _Box | str:
    """Class and box, as fractions: centre and size, or the corners of a polygon around it."""
    try:
        number, *values = (float(value) for value in line.split())
    except ValueError:
        return "a line of labels has something that is no number"
    if len(values) < 4 or not all(map(math.isfinite, (number, *values))):
        return "a line of labels has no class and box"
    label = names.get(int(number)) if number.is_integer() else None
    if label is None:
        return "a line's class is not among the names"
    # With a confidence behind it, a box has five numbers and a polygon an odd number of them.
    if len(values) < 6 or pose:
        x, y, width, height = values[:4]
        return label, x - width / 2, y - height / 2, x + width / 2, y + height / 2
    values = values[: len(values) // 2 * 2]
    xs, ys = values[::2], values[1::2]
    return label, min(xs), min(ys), max(xs), max(ys)


def _voc(files: _Files, heard: _Heard) -> _Found | None:
    images: list[_Annotated] = []
    found = False
    for file in files.all:
        if file.suffix.lower() != ".xml":
            continue
        try:
            root = fromstring((files.root / file).read_bytes(), forbid_dtd=True)
        except (ParseError, ValueError, DefusedXmlException):
            heard.leave_out("an XML file cannot be read", file)
            continue
        if root.tag != "annotation":
            continue
        found = True
        content = VOCDetection.parse_voc_xml(root).get("annotation")
        # An empty element is text or nothing at all.
        content = content if isinstance(content, dict) else {}
        image = files.image(str(content.get("filename", "")), files.scope_of(file), file.stem)
        if isinstance(image, str):
            heard.leave_out(image, file)
            continue
        boxes = []
        for thing in content.get("object", []):
            box = _voc_box(thing)
            if isinstance(box, str):
                heard.leave_out(box, file)
            else:
                boxes.append(box)
        images.append(_Annotated(image, boxes, size=_voc_size(content.get("size"))))
    if not found:
        return None
    return _Found(sorted({box[0] for image in images for box in image.boxes}), images)


def _voc_box(thing: Any) -> _Box | str:
    try:
        label, bounds = thing["name"], thing["bndbox"]
        x1, y1, x2, y2 = (float(bounds[key]) for key in ("xmin", "ymin", "xmax", "ymax"))
    except (TypeError, KeyError, ValueError):
        return _NO_BOX
    if not isinstance(label, str) or not all(map(math.isfinite, (x1, y1, x2, y2))):
        return _NO_BOX
    # VOC counts pixels from 1, and the last one belongs to the box.
    return label, x1 - 1, y1 - 1, x2, y2


def _voc_size(size: Any) -> tuple[object, object] | None:
    try:
        return int(size["width"]), int(size["height"])
    except (TypeError, KeyError, ValueError):
        return None


def _positive(value: object) -> bool:
    return isinstance(value, int | float) and value > 0


@dataclass(slots=True)
class _Seen:
    """What the results of an export show of a control."""

    labels: dict[str, None] = field(default_factory=dict)
    labels_from_name: str | None = None


def _label_studio(tasks: Sequence[Any], files: _Files, heard: _Heard) -> _Found:
    chosen: list[tuple[dict[str, Any], list[Any]]] = []
    for task in tasks:
        result = _result_that_counts(task)
        if result is None:
            heard.leave_out("the task is skipped, or not annotated", _task_name(task))
        else:
            chosen.append((task, result))
    controls = _controls([result for _, result in chosen])
    names = sorted({label.output for control in controls for label in control.labels})
    return _Found(names, _label_studio_images(chosen, controls, files, heard))


def _label_studio_images(
    chosen: Sequence[tuple[dict[str, Any], list[Any]]],
    controls: Sequence[BoxControl],
    files: _Files,
    heard: _Heard,
) -> Iterator[_Annotated]:
    to_names = {control.to_name for control in controls}
    everywhere = _Scope(PurePosixPath())
    for task, result in chosen:
        addresses = {key: a for key, v in task["data"].items() if (a := _image_path(v))}
        several = len(addresses) > 1
        if not addresses:
            heard.leave_out("the task's data has no image", _task_name(task))
        if several:
            # Only a label config tells which field an <Image> shows; mostly it has its name.
            addresses = {key: a for key, a in addresses.items() if key in to_names}
            if not addresses:
                heard.leave_out(
                    "of several images in the task's data none has the name of an annotated one",
                    _task_name(task),
                )
        for region in result:
            kind = str(region.get("type", "")) if isinstance(region, dict) else ""
            if kind.endswith("labels") and kind not in {"rectanglelabels", "labels"}:
                heard.leave_out(f"a region is no rectangle ({kind})", _task_name(task))
        for key, address in addresses.items():
            image = files.image(address, everywhere)
            if isinstance(image, str):
                heard.leave_out(image, address)
                continue
            boxes = []
            for control in controls:
                if several and control.to_name != key:
                    continue
                regions = read_regions(result, control)
                for dropped in regions.dropped:
                    heard.leave_out(dropped, _task_name(task))
                boxes += [(b.label, b.x1, b.y1, b.x2, b.y2) for b in regions.boxes]
            yield _Annotated(image, boxes, fractions=True)


def _task_name(task: Any) -> str:
    return f"task {task.get('id', '?') if isinstance(task, dict) else '?'}"


def _result_that_counts(task: Any) -> list[Any] | None:
    """The ground truth's, or else the newest annotation's result, as `learning.dataset` has it."""
    if not isinstance(task, dict) or not isinstance(task.get("data"), dict):
        return None
    annotations = task.get("annotations")
    standing = [
        a
        for a in (annotations if isinstance(annotations, list) else [])
        if isinstance(a, dict) and isinstance(a.get("result"), list) and not a.get("was_cancelled")
    ]
    if not standing:
        return None

    def rank(annotation: dict[str, Any]) -> tuple[bool, datetime]:
        try:
            moment = datetime.fromisoformat(str(annotation.get("updated_at")))
        except ValueError:
            moment = datetime.min
        return bool(annotation.get("ground_truth")), moment.replace(tzinfo=moment.tzinfo or UTC)

    # Of equals the last.
    result: list[Any] = sorted(standing, key=rank)[-1]["result"]
    return result


def _controls(results: Iterable[list[Any]]) -> list[BoxControl]:
    """The controls that drew the results: without a label config, they show in what they drew."""
    seen: dict[tuple[str, str], _Seen] = defaultdict(_Seen)
    for result in results:
        regions = [r for r in result if isinstance(r, dict) and isinstance(r.get("value"), dict)]
        labels_of = {str(r.get("id")): r for r in regions if r.get("type") == "labels"}
        for region in regions:
            kind = region.get("type")
            names: object = region["value"].get("rectanglelabels")
            source = str(region.get("from_name"))
            if kind == "rectangle" and (other := labels_of.get(str(region.get("id")))):
                names = other["value"].get("labels")
                source = str(other.get("from_name"))
            elif kind != "rectanglelabels":
                continue
            one = seen[str(region.get("from_name")), str(region.get("to_name"))]
            one.labels_from_name = source
            if isinstance(names, list):
                one.labels.update(dict.fromkeys(n for n in names if isinstance(n, str)))
    return [
        BoxControl(
            kind="rectanglelabels" if one.labels_from_name == from_name else "rectangle+labels",
            from_name=from_name,
            labels_from_name=one.labels_from_name or from_name,
            to_name=to_name,
            data_key=to_name,
            labels=tuple(Label(name) for name in one.labels),
        )
        for (from_name, to_name), one in sorted(seen.items())
    ]


def _image_path(value: object) -> str | None:
    """The path in an image's address: `/data/upload/1/a.jpg`, `/data/local-files/?d=a.jpg`, …"""
    if not isinstance(value, str):
        return None
    try:
        parts = urlsplit(value)
    except ValueError:
        return None
    path = unquote(parts.path)
    if path.endswith("/data/local-files/"):
        path = parse_qs(parts.query).get("d", [""])[0]
    return path if PurePosixPath(path.replace("\\", "/")).suffix.lower() in _SUFFIXES else None
