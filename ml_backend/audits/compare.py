"""Counts what became of the boxes of a prediction in the annotation that began with it.

Label Studio's editor copies the prediction's regions with their ids, so boxes are matched by id.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from ml_backend.label_studio.controls.base import Region

TOLERANCE = 0.001
"""Share of the image by which an edge may differ and count as left alone: percents are rounded."""


@dataclass(frozen=True, slots=True)
class Boxes:
    """Counts boxes by what became of them.

    Attributes:
        accepted: left as they were predicted.
        moved: moved or resized.
        relabelled: given another label, moved as well or not.
        deleted: predicted, and gone.
        added: drawn by hand.
    """

    accepted: int = 0
    moved: int = 0
    relabelled: int = 0
    deleted: int = 0
    added: int = 0

    def plus(self, other: Boxes, sign: int = 1) -> Boxes:
        """Adds other counts, or subtracts them (`sign=-1`)."""
        return Boxes(
            self.accepted + sign * other.accepted,
            self.moved + sign * other.moved,
            self.relabelled + sign * other.relabelled,
            self.deleted + sign * other.deleted,
            self.added + sign * other.added,
        )

    def as_dict(self) -> dict[str, int]:
        """Returns the counts by name."""
        return asdict(self)

    @property
    def predicted(self) -> int:
        """Counts the boxes that were shown."""
        return self.accepted + self.moved + self.relabelled + self.deleted

    @property
    def final(self) -> int:
        """Counts the boxes that the annotations ended up with."""
        return self.accepted + self.moved + self.relabelled + self.added

    @property
    def accepted_share(self) -> float | None:
        """Computes the share of predicted boxes left unchanged; None where none was predicted."""
        return self.accepted / self.predicted if self.predicted else None


def compare(predicted: Sequence[Region], annotated: Sequence[Region]) -> Boxes:
    """Counts what became of predicted boxes, by their ids.

    Args:
        predicted: the boxes of a prediction.
        annotated: the boxes of an annotation that began with it.
    """
    left = {box.region_id: box for box in predicted}
    accepted = moved = relabelled = added = 0
    for box in annotated:
        before = left.pop(box.region_id, None)
        if before is None:
            added += 1
        elif before.label != box.label:
            relabelled += 1
        elif _differ(before, box):
            moved += 1
        else:
            accepted += 1
    return Boxes(accepted, moved, relabelled, len(left), added)


def by_origin(annotated: Sequence[Region], predicted: int | None) -> Boxes:
    """Counts by the `origin` that the editor gives each box, where the prediction is gone.

    It does not tell moved from relabelled: both count as moved.

    Args:
        annotated: the boxes of an annotation.
        predicted: how many boxes the prediction had; where None, it is not known how many of them
            were deleted, and none counts.
    """
    origins = [box.origin for box in annotated]
    accepted = origins.count("prediction")
    moved = origins.count("prediction-changed")
    deleted = 0 if predicted is None else max(0, predicted - accepted - moved)
    return Boxes(accepted, moved, 0, deleted, len(origins) - accepted - moved)


def _differ(a: Region, b: Region) -> bool:
    return any(
        abs(one - other) > TOLERANCE
        for one, other in ((a.x1, b.x1), (a.y1, b.y1), (a.x2, b.x2), (a.y2, b.y2))
    )
