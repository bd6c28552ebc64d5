"""A control of another package, for tests: key points, each read as a small square."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from label_studio_sdk.label_interface.control_tags import ControlTag

from ml_backend.detection.types import Detections
from ml_backend.label_studio.controls.base import Control, Media, ReadRegions, Region, labels_in


@dataclass(frozen=True, slots=True)
class KeyPointLabels(Control):
    """Points with labels; a box becomes its centre, a point a box of a hundredth of the image."""

    media_tag = "Image"
    needs = "<KeyPointLabels>"
    result_types = frozenset({"keypointlabels"})

    @classmethod
    def parse(cls, tag: ControlTag, media: Media, tags: Sequence[ControlTag]) -> Self | None:
        """Reads a `KeyPointLabels` tag."""
        if tag.tag != "KeyPointLabels" or not tag.name:
            return None
        return cls(tag.name, media.name, media.data_key, labels_in(tag))

    @classmethod
    def infer(cls, results: Sequence[Sequence[Any]]) -> list[Self]:
        """Derives nothing."""
        return []

    def read_regions(self, result: Sequence[Any]) -> ReadRegions:
        """Reads each point as a square around it."""
        regions = []
        for region in result:
            if region.get("from_name") == self.from_name:
                value = region["value"]
                x, y = value["x"] / 100, value["y"] / 100
                corners = (x - 0.005, y - 0.005, x + 0.005, y + 0.005)
                regions.append(Region(value["keypointlabels"][0], *corners, region["id"], None))
        return ReadRegions(tuple(regions), ())

    def write_regions(
        self, found: Detections, names: Sequence[str], width: int, height: int
    ) -> list[dict[str, Any]]:
        """Writes the centre of each box."""
        return [
            {
                "id": str(number),
                "from_name": self.from_name,
                "to_name": self.to_name,
                "type": "keypointlabels",
                "value": {
                    "x": float(x1 + x2) / 2 / width * 100,
                    "y": float(y1 + y2) / 2 / height * 100,
                    "keypointlabels": [name],
                },
            }
            for number, ((x1, y1, x2, y2), name) in enumerate(zip(found.boxes, names, strict=True))
        ]
