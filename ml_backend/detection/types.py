"""The two values that everything in `detection` exchanges: what is there, and what was found."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Detections:
    """What a detector found in one image, most confident first.

    Attributes:
        boxes: float32 `[N, 4]`, `x1, y1, x2, y2` in pixels of the upright (EXIF applied) image.
        scores: float32 `[N]`, confidence in `[0, 1]`.
        labels: int64 `[N]`, index into the detector's tuple of label names.
        embedding: float32 `[D]`, unit length: what the image looks like to the detector's
            backbone; None where that was not asked for.
        size: width and height of the image, in pixels; None where that is not known.
    """

    boxes: FloatArray
    scores: FloatArray
    labels: IntArray
    embedding: FloatArray | None = None
    size: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self.scores)

    @classmethod
    def empty(cls) -> Detections:
        """No detection at all."""
        return cls(
            boxes=np.zeros((0, 4), np.float32),
            scores=np.zeros(0, np.float32),
            labels=np.zeros(0, np.int64),
        )

    def where(self, keep: npt.NDArray[np.bool_]) -> Detections:
        """The detections at which the boolean mask `keep`, `[N]`, is true."""
        return replace(
            self, boxes=self.boxes[keep], scores=self.scores[keep], labels=self.labels[keep]
        )

    def ranked(self) -> Detections:
        """The detections, most confident first; those of one confidence stay as they are."""
        order = np.argsort(-self.scores, kind="stable")
        return replace(
            self, boxes=self.boxes[order], scores=self.scores[order], labels=self.labels[order]
        )


@dataclass(frozen=True, slots=True)
class Sample:
    """One annotated image.

    Attributes:
        key: identity that outlives a training (the task).
        image: path of the encoded image file.
        boxes: float32 `[N, 4]`, `x1, y1, x2, y2` in pixels of the upright image. `N = 0` is a
            true negative: an image that a person found empty.
        labels: int64 `[N]`, index into the tuple of label names that accompanies the samples.
    """

    key: str
    image: Path
    boxes: FloatArray
    labels: IntArray
