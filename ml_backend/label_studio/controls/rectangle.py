"""`<Rectangle>` with `<Labels>`: boxes of one control, their labels of another."""

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
    labels_tag_of,
    score_threshold_of,
)
from ml_backend.label_studio.controls.boxes import read_boxes, rectangles


@dataclass(frozen=True, slots=True)
class Rectangle(Control):
    """Boxes of a `Rectangle` whose labels come from the `Labels` of the same image.

    Each box has two results with one id: one of the `Rectangle`, one of the `Labels`. A rotated
    rectangle is read as the box that encloses it. Of several labels of a region the first one that
    the control has is used.

    Attributes:
        labels_from_name: name of the `Labels` in results.
    """

    media_tag = "Image"
    needs = "<Rectangle> and <Labels>"
    result_types = frozenset({"rectangle", "labels"})

    labels_from_name: str = ""

    @classmethod
    def parse(cls, tag: ControlTag, media: Media, tags: Sequence[ControlTag]) -> Self | None:
        """Reads a `Rectangle` tag and the first `Labels` tag of its image.

        `model_score_threshold` may be on either; that of the `Rectangle` has priority.
        """
        labels = labels_tag_of(media, tags) if tag.tag == "Rectangle" else None
        if labels is None or not tag.name or not labels.name:
            return None
        return cls(
            tag.name,
            media.name,
            media.data_key,
            labels_in(labels),
            score_threshold_of(tag, labels),
            labels.name,
        )

    @classmethod
    def infer(cls, results: Sequence[Sequence[Any]]) -> list[Self]:
        """Derives the controls from pairs of a `rectangle` and a `labels` result with one id."""
        seen: dict[tuple[str, str], dict[str, None]] = defaultdict(dict)
        labels_from: dict[tuple[str, str], str] = {}
        for result in results:
            regions = [
                r for r in result if isinstance(r, dict) and isinstance(r.get("value"), dict)
            ]
            labels_of = {str(r.get("id")): r for r in regions if r.get("type") == "labels"}
            for region in regions:
                other = labels_of.get(str(region.get("id")))
                if region.get("type") != "rectangle" or other is None:
                    continue
                key = str(region.get("from_name")), str(region.get("to_name"))
                labels_from[key] = str(other.get("from_name"))
                names = other["value"].get("labels")
                if isinstance(names, list):
                    seen[key].update(dict.fromkeys(n for n in names if isinstance(n, str)))
        return [
            cls(
                from_name,
                to_name,
                to_name,
                tuple(map(Label, seen[from_name, to_name])),
                labels_from_name=labels_from_name,
            )
            for (from_name, to_name), labels_from_name in labels_from.items()
        ]

    def read_regions(self, result: Sequence[Any]) -> ReadRegions:
        """Reads the boxes, with the labels that the results of the `Labels` give to their ids."""
        names = self._names_by_region(result)
        return read_boxes(self, result, lambda region: names.get(str(region.get("id", ""))))

    def write_regions(
        self, found: Detections, names: Sequence[str], width: int, height: int
    ) -> list[dict[str, Any]]:
        """Writes two results with one id for each detection: its rectangle, and its label."""
        written: list[dict[str, Any]] = []
        for common, place, name in rectangles(
            found, names, width, height, self.from_name, self.to_name
        ):
            written += [
                {**common, "from_name": self.from_name, "type": "rectangle", "value": place},
                {
                    **common,
                    "from_name": self.labels_from_name,
                    "type": "labels",
                    "value": {**place, "labels": [name]},
                },
            ]
        return written

    def _names_by_region(self, result: Sequence[Any]) -> dict[str, list[Any]]:
        return {
            str(region.get("id", "")): region["value"]["labels"]
            for region in result
            if isinstance(region, dict)
            and region.get("from_name") == self.labels_from_name
            and isinstance(region.get("value"), dict)
            and isinstance(region["value"].get("labels"), list)
        }
