"""Regions: boxes as Label Studio keeps them, percent of the image as it is displayed."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ml_backend.label_studio.label_config import BoxControl


@dataclass(frozen=True, slots=True)
class Box:
    """A box of an annotation.

    Attributes:
        label: its label, as it stands in results.
        x1: left, as a fraction of the displayed image's width, in `[0, 1]`.
        y1: top, as a fraction of its height.
        x2: right.
        y2: bottom.
        region_id: the region's id.
        origin: `prediction`, `prediction-changed` or `manual`, where Label Studio says it.
    """

    label: str
    x1: float
    y1: float
    x2: float
    y2: float
    region_id: str
    origin: str | None


@dataclass(frozen=True, slots=True)
class ReadRegions:
    """What an annotation's result holds for one control.

    Attributes:
        boxes: its boxes.
        dropped: why a region was left out, one sentence for each.
    """

    boxes: tuple[Box, ...]
    dropped: tuple[str, ...]


def read_regions(result: Sequence[Any], control: BoxControl) -> ReadRegions:
    """Reads the boxes that a control drew.

    A rotated rectangle becomes the box that encloses it; what lies outside of the image is cut
    off. Of several labels of a region the first that the control knows counts.

    Args:
        result: an annotation's `result`.
        control: the control; regions of others are passed over.
    """
    known = {label.output for label in control.labels}
    names = _label_names(result, control)
    boxes: list[Box] = []
    dropped: list[str] = []
    for region in result:
        if not isinstance(region, dict) or region.get("from_name") != control.from_name:
            continue
        if region.get("to_name") != control.to_name:
            continue
        number = str(region.get("id", ""))
        own = names.get(number, []) if control.labels_from_name != control.from_name else None
        value = region.get("value")
        if not isinstance(value, dict):
            dropped.append("a region has no value")
            continue
        given = own if own is not None else value.get("rectanglelabels")
        if not isinstance(given, list):
            given = []
        label = next((name for name in given if isinstance(name, str) and name in known), None)
        if label is None:
            dropped.append(
                f"a region's label {', '.join(map(str, given)) or '(none)'} is not in the config"
            )
            continue
        corners = _enclosing(value, region)
        if isinstance(corners, str):
            dropped.append(corners)
            continue
        origin = region.get("origin")
        boxes.append(Box(label, *corners, number, origin if isinstance(origin, str) else None))
    return ReadRegions(tuple(boxes), tuple(dropped))


def write_regions(
    boxes: npt.NDArray[np.float32],
    scores: npt.NDArray[np.float32],
    labels: Sequence[str],
    control: BoxControl,
    width: int,
    height: int,
) -> list[dict[str, Any]]:
    """Writes boxes as a prediction's regions.

    Args:
        boxes: float32 `[N, 4]`, `x1, y1, x2, y2` in pixels of the upright image.
        scores: float32 `[N]`, confidence in `[0, 1]`.
        labels: `N` names, as they stand in results.
        control: the control that draws them.
        width: of the upright image, in pixels.
        height: of the upright image, in pixels.

    Returns:
        One result for each box; two that share an id for a `Rectangle` with `Labels`. The same
        boxes get the same ids again.
    """
    result: list[dict[str, Any]] = []
    scale = np.array([100 / width, 100 / height] * 2)
    for number, (box, score, label) in enumerate(zip(boxes, scores, labels, strict=True)):
        x1, y1, x2, y2 = np.clip(box.astype(np.float64) * scale, 0.0, 100.0).tolist()
        value: dict[str, Any] = {
            "x": x1,
            "y": y1,
            "width": x2 - x1,
            "height": y2 - y1,
            "rotation": 0,
        }
        mark = f"{control.from_name}:{control.to_name}:{number}:{box.tolist()}:{label}"
        common = {
            "id": hashlib.sha256(mark.encode()).hexdigest()[:10],
            "to_name": control.to_name,
            "original_width": width,
            "original_height": height,
            "image_rotation": 0,
            "score": float(score),
        }
        if control.kind == "rectanglelabels":
            result.append(
                {
                    **common,
                    "from_name": control.from_name,
                    "type": "rectanglelabels",
                    "value": {**value, "rectanglelabels": [label]},
                }
            )
        else:
            result.append(
                {**common, "from_name": control.from_name, "type": "rectangle", "value": value}
            )
            result.append(
                {
                    **common,
                    "from_name": control.labels_from_name,
                    "type": "labels",
                    "value": {**value, "labels": [label]},
                }
            )
    return result


def _label_names(result: Sequence[Any], control: BoxControl) -> dict[str, list[Any]]:
    """Labels of the regions of a `Rectangle`: they stand in results of their own, by id."""
    names: dict[str, list[Any]] = {}
    for region in result:
        if (
            isinstance(region, dict)
            and region.get("from_name") == control.labels_from_name
            and isinstance(region.get("value"), dict)
            and isinstance(region["value"].get("labels"), list)
        ):
            names[str(region.get("id", ""))] = region["value"]["labels"]
    return names


def _enclosing(
    value: dict[str, Any], region: dict[str, Any]
) -> tuple[float, float, float, float] | str:
    """Corners as fractions of the image, or why there are none."""
    try:
        x, y, width, height = (_number(value.get(name)) for name in ("x", "y", "width", "height"))
        rotation = _number(value.get("rotation") or 0)
        # Angles hold in pixels, not in percent: the image's shape matters.
        image_width = _number(region.get("original_width") or 1)
        image_height = _number(region.get("original_height") or 1)
    except (TypeError, OverflowError):
        return "a region has a coordinate that is no number"
    if not all(map(math.isfinite, (x, y, width, height, rotation, image_width, image_height))):
        return "a region has a coordinate that is not finite"
    if image_width <= 0 or image_height <= 0:
        return "a region's original_width or original_height is not positive"
    left, top = x / 100 * image_width, y / 100 * image_height
    across, down = width / 100 * image_width, height / 100 * image_height
    cos, sin = math.cos(math.radians(rotation)), math.sin(math.radians(rotation))
    # Label Studio turns a rectangle about its top left corner.
    corners = [
        (left + dx * cos - dy * sin, top + dx * sin + dy * cos)
        for dx, dy in ((0, 0), (across, 0), (0, down), (across, down))
    ]
    if not all(math.isfinite(c) for corner in corners for c in corner):
        return "a region has a coordinate that is far too large"
    xs = [min(max(cx / image_width, 0.0), 1.0) for cx, _ in corners]
    ys = [min(max(cy / image_height, 0.0), 1.0) for _, cy in corners]
    x1, x2, y1, y2 = min(xs), max(xs), min(ys), max(ys)
    if x2 - x1 <= 1e-6 or y2 - y1 <= 1e-6:
        return "a region has no area inside the image"
    return x1, y1, x2, y2


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError
    return float(value)
