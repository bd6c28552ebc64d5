"""Any COCO-format folder (`annotations.json` and `images/`), as samples."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import numpy as np

from ml_backend.detection.types import Sample


def load_coco(folder: Path) -> tuple[tuple[str, ...], list[Sample]]:
    """Label names and samples of a COCO data set.

    Args:
        folder: holds `annotations.json`, and the images in `images/`.
    """
    content = json.loads((folder / "annotations.json").read_text())
    names = {c["id"]: c["name"] for c in content["categories"]}
    labels = tuple(names.values())
    boxes: dict[int, list[list[float]]] = defaultdict(list)
    classes: dict[int, list[int]] = defaultdict(list)
    for a in content["annotations"]:
        x, y, width, height = a["bbox"]
        boxes[a["image_id"]].append([x, y, x + width, y + height])
        classes[a["image_id"]].append(labels.index(names[a["category_id"]]))
    samples = [
        Sample(
            key=str(image["id"]),
            image=folder / "images" / Path(image["file_name"]).name,
            boxes=np.array(boxes[image["id"]], np.float32).reshape(-1, 4),
            labels=np.array(classes[image["id"]], np.int64),
        )
        for image in sorted(content["images"], key=lambda i: i["id"])
    ]
    return labels, samples
