"""YOLO: a text file of class numbers and boxes for each image."""

from __future__ import annotations

import math
from pathlib import Path, PurePosixPath

import yaml

from ml_backend.datasets.folder import MISSING, Folder
from ml_backend.datasets.formats.base import AnnotatedImage, Annotations, Box, DatasetFormat
from ml_backend.datasets.types import DatasetError, Omissions


class Yolo(DatasetFormat):
    """YOLO's format (https://docs.ultralytics.com/datasets/detect).

    Read are the names of the classes from `data.yaml` or `classes.txt`, and for each image a text
    file in `labels/` where its path has `images/`, or else beside it. An image without a text file
    is annotated as empty, if its folder has text files at all. Written are `data.yaml`, whose
    training and validation images are the same, and `labels/`.
    """

    description = "YOLO (data.yaml or classes.txt, images/ and labels/)"

    def recognises(self, folder: Folder) -> bool:
        """Says whether names of classes are declared."""
        return _classes(folder) is not None

    def read(self, folder: Folder, omissions: Omissions) -> Annotations:
        """Reads the boxes; a polygon is read as the box that encloses it."""
        names, with_keypoints = _classes(folder) or ({}, False)
        texts = {file for file in folder.files if file.suffix.lower() == ".txt"}
        labelled = {f.parent for f in texts if _is_in_labels(f)}
        if not labelled:
            # Images and labels are in one folder, as LabelImg writes them.
            stems = {image.with_suffix("") for image in folder.images}
            labelled = {f.parent for f in texts if f.with_suffix("") in stems}
        images: list[AnnotatedImage] = []
        used: set[PurePosixPath] = set()
        for image in folder.images:
            text = _label_file(image)
            if text.parent not in labelled:
                # These images are not annotated as empty: nobody has labelled this folder.
                omissions.add("the image's folder has no label files", image)
                continue
            used.add(text)
            boxes = []
            if text in texts:
                for line in filter(None, _lines(folder.root / text)):
                    box = _box(line, names, with_keypoints)
                    if isinstance(box, str):
                        omissions.add(box, text)
                    else:
                        boxes.append(box)
            images.append(AnnotatedImage(image, boxes, fractions=True))
        for text in sorted(texts - used):
            if _is_in_labels(text) and text.name != "classes.txt":
                omissions.add(MISSING, text)
        return Annotations(list(names.values()), images)

    def write(self, annotations: Annotations, folder: Path) -> None:
        """Writes `data.yaml`, and a text file for each image, an empty one if it has no box."""
        number = {name: i for i, name in enumerate(annotations.names)}
        for one in annotations.images:
            width, height = one.size or (0, 0)
            size = float(str(width)), float(str(height))
            file = folder / _label_file(one.image)
            file.parent.mkdir(parents=True, exist_ok=True)
            lines = [f"{number[box[0]]} {_centre_and_size(box, *size)}\n" for box in one.boxes]
            file.write_text("".join(lines))
        content = {
            "path": ".",
            "train": self.image_folder,
            "val": self.image_folder,
            "names": {i: name for name, i in number.items()},
        }
        text = yaml.safe_dump(content, allow_unicode=True, sort_keys=False)
        (folder / "data.yaml").write_text(text, encoding="utf-8")


def _is_in_labels(file: PurePosixPath) -> bool:
    return "labels" in map(str.lower, file.parts[:-1])


def _label_file(image: PurePosixPath) -> PurePosixPath:
    """Makes the path of an image's text file: `labels` replaces the last `images` of the path."""
    parts = list(image.with_suffix(".txt").parts)
    for i in range(len(parts) - 2, -1, -1):
        if parts[i].lower() == "images":
            parts[i] = "labels"
            break
    return PurePosixPath(*parts)


def _classes(folder: Folder) -> tuple[dict[int, str], bool] | None:
    """Reads the names of the classes by number, and whether keypoints follow the boxes."""
    for file in folder.files:
        if len(file.parts) < 3 and file.suffix.lower() in {".yaml", ".yml"}:
            path = folder.root / file
            try:
                content = yaml.safe_load(path.read_bytes())
            except (OSError, ValueError, yaml.YAMLError) as error:
                line = " ".join(str(error).split())
                raise DatasetError(f"{path} is no valid YAML: {line}") from error
            if not isinstance(content, dict) or not content.get("names"):
                continue
            names = content["names"]
            try:
                pairs = names.items() if isinstance(names, dict) else enumerate(names)
                by_number = {int(number): str(name) for number, name in pairs}
            except (TypeError, ValueError) as error:
                raise DatasetError(
                    f"names in {path} must be a list, or a mapping from numbers"
                ) from error
            return dict(sorted(by_number.items())), "kpt_shape" in content
    for file in folder.files:
        if len(file.parts) < 3 and file.name == "classes.txt":
            return dict(enumerate(_lines(folder.root / file))), False
    return None


def _lines(file: Path) -> list[str]:
    text = file.read_text(encoding="utf-8-sig", errors="replace")
    return [line.strip() for line in text.rstrip().splitlines()]


def _box(line: str, names: dict[int, str], with_keypoints: bool) -> Box | str:
    """Reads the box of a line, in fractions, or answers the reason why there is none."""
    try:
        number, *values = (float(value) for value in line.split())
    except ValueError:
        return "a line of labels has something that is no number"
    if len(values) < 4 or not all(map(math.isfinite, (number, *values))):
        return "a line of labels has no class and box"
    label = names.get(int(number)) if number.is_integer() else None
    if label is None:
        return "a line's class is not among the names"
    # A line of a prediction ends with a confidence: five numbers, or an odd number for a polygon.
    if len(values) < 6 or with_keypoints:
        x, y, width, height = values[:4]
        return label, x - width / 2, y - height / 2, x + width / 2, y + height / 2
    values = values[: len(values) // 2 * 2]
    xs, ys = values[::2], values[1::2]
    return label, min(xs), min(ys), max(xs), max(ys)


def _centre_and_size(box: Box, width: float, height: float) -> str:
    _, x1, y1, x2, y2 = box
    numbers = (
        (x1 + x2) / 2 / width,
        (y1 + y2) / 2 / height,
        (x2 - x1) / width,
        (y2 - y1) / height,
    )
    return " ".join(f"{number:.9g}" for number in numbers)
