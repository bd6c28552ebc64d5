"""Reading and writing of boxes: conversion between Label Studio's rectangles and corners.

Label Studio gives a rectangle's top left corner, width and height in percent of the image as it is
displayed, and turns it clockwise about that corner by `rotation` degrees.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ml_backend.detection.types import Detections
from ml_backend.label_studio.controls.base import (
    Control,
    ReadRegions,
    Region,
    first_known,
    origin_of,
    unknown_label,
)


def read_boxes(
    control: Control, result: Sequence[Any], names_of: Callable[[Mapping[str, Any]], object]
) -> ReadRegions:
    """Reads the boxes that a control drew.

    Args:
        control: the control; regions of others are ignored.
        result: the `result` of an annotation or a prediction, as JSON; it may hold anything.
        names_of: finds the label names of a region, as JSON; its `value` is an object.
    """
    regions: list[Region] = []
    dropped: list[str] = []
    for region in result:
        if (
            not isinstance(region, dict)
            or region.get("from_name") != control.from_name
            or region.get("to_name") != control.to_name
        ):
            continue
        value = region.get("value")
        if not isinstance(value, dict):
            dropped.append("a region has no value")
            continue
        names = names_of(region)
        label = first_known(names, control.labels)
        if label is None:
            dropped.append(unknown_label(names))
            continue
        corners = corners_of(value, region)
        if isinstance(corners, str):
            dropped.append(corners)
            continue
        regions.append(Region(label, *corners, str(region.get("id", "")), origin_of(region)))
    return ReadRegions(tuple(regions), tuple(dropped))


def corners_of(
    value: Mapping[str, Any], region: Mapping[str, Any]
) -> tuple[float, float, float, float] | str:
    """Computes the box that encloses a rectangle, cut off at the image's edges.

    Args:
        value: the region's `value`: `x`, `y`, `width`, `height` in percent, `rotation` in degrees.
        region: the region, with `original_width` and `original_height` in pixels.

    Returns:
        `x1, y1, x2, y2` as fractions of the image, or the reason why there is no box.
    """
    try:
        x, y, width, height = (_number(value.get(name)) for name in ("x", "y", "width", "height"))
        rotation = _number(value.get("rotation") or 0)
        # An angle holds in pixels, not in percent, so the image's shape matters.
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


def rectangles(
    found: Detections, names: Sequence[str], width: int, height: int, drawn_by: str, to_name: str
) -> Iterator[tuple[dict[str, Any], dict[str, float], str]]:
    """Turns detections into Label Studio's rectangles.

    Args:
        found: `N` detections; boxes are `x1, y1, x2, y2` in pixels of the upright image.
        names: `N` label names.
        width: width of the upright image, in pixels.
        height: height of the upright image, in pixels.
        drawn_by: name of the control; ids depend on it.
        to_name: name of the object tag; ids depend on it.

    Yields:
        For each detection the fields of a region without `from_name`, `type` and `value`; the
        rectangle that `value` holds; and the label's name. Boxes are cut off at the image's edges.
    """
    scale = np.array([100 / width, 100 / height] * 2)
    for number, (box, score, name) in enumerate(zip(found.boxes, found.scores, names, strict=True)):
        x1, y1, x2, y2 = np.clip(box.astype(np.float64) * scale, 0.0, 100.0).tolist()
        mark = f"{drawn_by}:{to_name}:{number}:{box.tolist()}:{name}"
        common = {
            "id": hashlib.sha256(mark.encode()).hexdigest()[:10],
            "to_name": to_name,
            "original_width": width,
            "original_height": height,
            "image_rotation": 0,
            "score": float(score),
        }
        place = {"x": x1, "y": y1, "width": x2 - x1, "height": y2 - y1, "rotation": 0}
        yield common, place, name


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError
    return float(value)
