"""COCO: one JSON file with lists of images, annotations and categories."""

from __future__ import annotations

import json
import math
from pathlib import Path, PurePosixPath
from typing import Any

from ml_backend.datasets.folder import Folder
from ml_backend.datasets.formats.base import AnnotatedImage, Annotations, Box, DatasetFormat
from ml_backend.datasets.types import Omissions

_LISTS = ("images", "annotations", "categories")


class Coco(DatasetFormat):
    """COCO's format for object detection (https://cocodataset.org/#format-data).

    Read are `annotations.json`, `_annotations.coco.json`, `annotations/*.json`, each also in the
    folders of splits. Written is `annotations.json`.
    """

    description = "COCO (a JSON file with images, annotations and categories)"
    file_suffixes = frozenset({".json"})

    def recognises(self, folder: Folder) -> bool:
        """Says whether a JSON file has the three lists."""
        return bool(_contents(folder))

    def read(self, folder: Folder, omissions: Omissions) -> Annotations:
        """Reads the boxes of all such files; segmentations are not used, crowds are left out."""
        names: list[str] = []
        images: list[AnnotatedImage] = []
        for file, content in _contents(folder):
            categories = {
                c["id"]: str(c["name"])
                for c in content["categories"]
                if isinstance(c, dict) and isinstance(c.get("id"), int | str) and "name" in c
            }
            names += categories.values()
            images += _images(file, content, categories, folder, omissions)
        return Annotations(names, images)

    def write(self, annotations: Annotations, folder: Path) -> None:
        """Writes `annotations.json`; ids begin with 1."""
        category = {name: number for number, name in enumerate(annotations.names, 1)}
        images: list[dict[str, Any]] = []
        boxes: list[dict[str, Any]] = []
        for number, one in enumerate(annotations.images, 1):
            width, height = one.size or (0, 0)
            images.append(
                {"id": number, "file_name": str(one.image), "width": width, "height": height}
            )
            for name, x1, y1, x2, y2 in one.boxes:
                boxes.append(
                    {
                        "id": len(boxes) + 1,
                        "image_id": number,
                        "category_id": category[name],
                        "bbox": [x1, y1, x2 - x1, y2 - y1],
                        "area": (x2 - x1) * (y2 - y1),
                        "segmentation": [],
                        "iscrowd": 0,
                    }
                )
        categories = [{"id": number, "name": name} for name, number in category.items()]
        content = {"images": images, "annotations": boxes, "categories": categories}
        (folder / "annotations.json").write_text(json.dumps(content))


def _contents(folder: Folder) -> list[tuple[PurePosixPath, dict[str, Any]]]:
    return [
        (file, content)
        for file, content in folder.json_contents
        if isinstance(content, dict) and all(isinstance(content.get(k), list) for k in _LISTS)
    ]


def _images(
    file: PurePosixPath,
    content: dict[str, Any],
    categories: dict[int | str, str],
    folder: Folder,
    omissions: Omissions,
) -> list[AnnotatedImage]:
    scope = folder.scope_of(file)
    by_id: dict[int | str, AnnotatedImage] = {}
    missing: set[int | str] = set()
    for entry in content["images"]:
        fields = entry if isinstance(entry, dict) else {}
        number, name = fields.get("id"), fields.get("file_name")
        if not isinstance(number, int | str) or not isinstance(name, str):
            omissions.add("an image of the list has no id or no file_name", file)
            continue
        image = folder.image(name, scope)
        if isinstance(image, str):
            omissions.add(image, name)
            missing.add(number)
        else:
            size = (fields.get("width"), fields.get("height"))
            by_id[number] = AnnotatedImage(image, [], size=size)
    for annotation in content["annotations"]:
        box = _box(annotation, categories)
        if isinstance(box, str):
            omissions.add(box, file)
        elif annotation["image_id"] in by_id:
            by_id[annotation["image_id"]].boxes.append(box)
        elif annotation["image_id"] not in missing:
            omissions.add("an annotation's image is not in the list", file)
    return list(by_id.values())


def _box(annotation: Any, categories: dict[int | str, str]) -> Box | str:
    """Reads the box of an annotation, or answers the reason why there is none."""
    try:
        if annotation.get("iscrowd"):
            return "a crowd (iscrowd) is no single object"
        x, y, width, height = (float(number) for number in annotation["bbox"])
        # An id that cannot be hashed cannot be looked up either.
        known, _ = annotation["category_id"] in categories, hash(annotation["image_id"])
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
        return "an annotation has no image_id, no category_id, or no bbox of four numbers"
    if not known:
        return "an annotation's category is not in the list"
    if not all(map(math.isfinite, (x, y, width, height))):
        return "a box has a coordinate that is not finite"
    return categories[annotation["category_id"]], x, y, x + width, y + height
