"""Small data sets on disk for tests, each in the layout that people have."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from ml_backend.datasets.types import LabelledData
from ml_backend.detection.decoding import decode_image
from ml_backend.detection.types import Sample

LABELS = ("car", "truck")
# Name, stored width and height, EXIF orientation, boxes (label, x1, y1, x2, y2) when upright.
Picture = tuple[str, int, int, int, list[tuple[str, int, int, int, int]]]
FIVE: list[Picture] = [
    ("a.jpg", 80, 60, 1, [("car", 8, 6, 40, 30), ("truck", 40, 30, 80, 60)]),
    ("b.png", 100, 50, 1, [("truck", 10, 5, 30, 45)]),
    ("c.jpg", 64, 64, 1, []),
    # Turned by a quarter: 60 wide and 80 high when upright.
    ("d.jpg", 80, 60, 6, [("car", 30, 40, 60, 80)]),
    ("e.jpg", 40, 40, 1, [("car", 0, 0, 40, 40), ("car", 4, 8, 12, 16)]),
]
Box = tuple[str, float, float, float, float]


def write_coco(folder: Path, pictures: list[Picture]) -> None:
    save_images(folder / "images", pictures)
    write_json(folder / "annotations.json", coco_content(pictures))


def write_voc(
    folder: Path,
    pictures: list[Picture],
    annotations: str = "Annotations",
    images: str = "JPEGImages",
) -> None:
    save_images(folder / images, pictures)
    (folder / annotations).mkdir(exist_ok=True)
    for name, *_, boxes in pictures:
        width, height = _upright_size(folder / images / name)
        objects = "".join(
            f"<object><name>{label}</name><bndbox><xmin>{x1 + 1}</xmin><ymin>{y1 + 1}</ymin>"
            f"<xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
            for label, x1, y1, x2, y2 in boxes
        )
        (folder / annotations / Path(name).with_suffix(".xml")).write_text(
            f"<annotation><filename>{name}</filename><size><width>{width}</width>"
            f"<height>{height}</height><depth>3</depth></size>{objects}</annotation>"
        )


def write_yolo(
    folder: Path, pictures: list[Picture], images: str = "images", labels: str = "labels"
) -> None:
    """An image without a box has no file of labels."""
    save_images(folder / images, pictures)
    (folder / labels).mkdir(parents=True, exist_ok=True)
    (folder / "data.yaml").write_text(f"nc: 2\nnames: [{', '.join(LABELS)}]\n")
    for name, *_, boxes in pictures:
        width, height = _upright_size(folder / images / name)
        lines = [
            f"{LABELS.index(label)} {(x1 + x2) / 2 / width} {(y1 + y2) / 2 / height} "
            f"{(x2 - x1) / width} {(y2 - y1) / height}\n"
            for label, x1, y1, x2, y2 in boxes
        ]
        if lines:
            (folder / labels / Path(name).with_suffix(".txt")).write_text("".join(lines))


def write_label_studio(folder: Path, pictures: list[Picture]) -> None:
    save_images(folder / "upload/3", pictures)
    tasks = []
    for name, *_, boxes in pictures:
        width, height = _upright_size(folder / "upload/3" / name)
        result = [
            export_region(
                ("image", label),
                (x1 / width, y1 / height, (x2 - x1) / width, (y2 - y1) / height),
            )
            for label, x1, y1, x2, y2 in boxes
        ]
        tasks.append(export_task(f"/data/upload/3/{name}", {"result": result}))
    write_json(folder / "project-1.json", tasks)


WRITERS: dict[str, Callable[[Path, list[Picture]], None]] = {
    "coco": write_coco,
    "voc": write_voc,
    "yolo": write_yolo,
    "label_studio": write_label_studio,
}


def coco_content(pictures: list[Picture]) -> dict[str, Any]:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, (name, width, height, orientation, boxes) in enumerate(pictures, 1):
        size = (height, width) if orientation == 6 else (width, height)
        images.append({"id": number, "file_name": name, "width": size[0], "height": size[1]})
        annotations += [
            {
                "id": len(annotations) + i,
                "image_id": number,
                "category_id": LABELS.index(label) + 1,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "iscrowd": 0,
            }
            for i, (label, x1, y1, x2, y2) in enumerate(boxes)
        ]
    categories = [{"id": i, "name": name} for i, name in enumerate(LABELS, 1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def export_region(
    names: tuple[str, str], place: tuple[float, float, float, float] = (0.1, 0.1, 0.5, 0.5)
) -> dict[str, Any]:
    """A rectangle on the image `names[0]` with the label `names[1]`."""
    keys = ("x", "y", "width", "height")
    value = {key: number * 100 for key, number in zip(keys, place, strict=True)}
    return {
        "id": "r",
        "from_name": "label",
        "to_name": names[0],
        "type": "rectanglelabels",
        "value": value | {"rotation": 0, "rectanglelabels": [names[1]]},
    }


def export_task(image: str, *annotations: dict[str, Any]) -> dict[str, Any]:
    return {"id": 1, "data": {"image": image}, "annotations": list(annotations)}


def save_images(folder: Path, pictures: list[Picture]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, width, height, orientation, _ in pictures:
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.new("RGB", (width, height), "grey").save(folder / name, exif=exif)


def _upright_size(image: Path) -> tuple[int, int]:
    return decode_image(image).size


def write_json(file: Path, content: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def boxes_of(data: LabelledData, sample: Sample) -> list[Box]:
    return [
        (data.labels[label], *box)
        for label, box in zip(sample.labels.tolist(), sample.boxes.tolist(), strict=True)
    ]
