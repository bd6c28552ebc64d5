"""`<RectangleLabels>`: boxes with labels on an image."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from label_studio_sdk.label_interface.control_tags import ControlTag

from ml_backend.detection.types import Detections
from ml_backend.label_studio.controls.base import (
    Control,
    Label,
    Media,
    ReadRegions,
    labels_in,
    score_threshold_of,
)
from ml_backend.label_studio.controls.boxes import read_boxes, rectangles

TYPE = "rectanglelabels"


@dataclass(frozen=True, slots=True)
class RectangleLabels(Control):
    """Boxes and their labels, drawn by one control.

    A rotated rectangle is read as the box that encloses it. Of several labels of a region the first
    one that the control has is used.
    """

    media_tag = "Image"
    needs = "<RectangleLabels> with at least one <Label>"
    result_types = frozenset({TYPE})

    @classmethod
    def parse(cls, tag: ControlTag, media: Media, tags: Sequence[ControlTag]) -> Self | None:
        """Reads a `RectangleLabels` tag."""
        labels = labels_in(tag) if tag.tag == "RectangleLabels" else ()
        if not labels or not tag.name:
            return None
        return cls(tag.name, media.name, media.data_key, labels, score_threshold_of(tag))

    @classmethod
    def infer(cls, results: Sequence[Sequence[Any]]) -> list[Self]:
        """Derives the controls from regions of the type `rectanglelabels`."""
        seen: dict[tuple[str, str], dict[str, None]] = defaultdict(dict)
        for result in results:
            for region in result:
                if (
                    not isinstance(region, dict)
                    or region.get("type") != TYPE
                    or not isinstance(region.get("value"), dict)
                ):
                    continue
                names = region["value"].get(TYPE)
                labels = seen[str(region.get("from_name")), str(region.get("to_name"))]
                if isinstance(names, list):
                    labels.update(dict.fromkeys(n for n in names if isinstance(n, str)))
        return [
            cls(from_name, to_name, to_name, tuple(map(Label, labels)))
            for (from_name, to_name), labels in seen.items()
        ]

    def read_regions(self, result: Sequence[Any]) -> ReadRegions:
        """Reads the boxes; each region holds its labels itself."""
        return read_boxes(self, result, lambda region: region["value"].get(TYPE))

    def write_regions(
        self, found: Detections, names: Sequence[str], width: int, height: int
    ) -> list[dict[str, Any]]:
        """Writes one region for each detection."""
        return [
            {
                **common,
                "from_name": self.from_name,
                "type": TYPE,
                "value": {**place, TYPE: [name]},
            }
            for common, place, name in rectangles(
                found, names, width, height, self.from_name, self.to_name
            )
        ]
