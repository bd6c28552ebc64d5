"""Defines the two values that `detection` exchanges: annotated samples, and detections."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Detections:
    """The detections in one image, most confident first.

    The optional fields follow supervision's `Detections`; where one is None it costs nothing.

    Attributes:
        boxes: float32 `[N, 4]`, `x1, y1, x2, y2` in pixels of the upright (EXIF applied) image.
        scores: float32 `[N]`, confidence in `[0, 1]`.
        labels: int64 `[N]`, index into the detector's tuple of label names.
        embedding: float32 `[D]`, unit length: a vector of the image from the detector's backbone;
            None where none was asked for.
        size: width and height of the image, in pixels; None where not known.
        masks: bool `[N, H, W]`, one segmentation mask for each detection, in pixels of the image;
            None where the detector makes none.
        track_ids: int64 `[N]`, the track that each detection belongs to; None without tracking.
    """

    boxes: FloatArray
    scores: FloatArray
    labels: IntArray
    embedding: FloatArray | None = None
    size: tuple[int, int] | None = None
    masks: BoolArray | None = None
    track_ids: IntArray | None = None

    def __len__(self) -> int:
        return len(self.scores)

    @classmethod
    def empty(cls) -> Detections:
        """Makes a value without any detection."""
        return cls(
            boxes=np.zeros((0, 4), np.float32),
            scores=np.zeros(0, np.float32),
            labels=np.zeros(0, np.int64),
        )

    def where(self, keep: BoolArray) -> Detections:
        """Selects the detections at which the boolean mask `keep`, `[N]`, is true."""
        return self._rows(keep)

    def ranked(self) -> Detections:
        """Sorts by confidence, highest first; equal confidences keep their order."""
        return self._rows(np.argsort(-self.scores, kind="stable"))

    def _rows(self, chosen: BoolArray | npt.NDArray[np.intp]) -> Detections:
        return replace(
            self,
            boxes=self.boxes[chosen],
            scores=self.scores[chosen],
            labels=self.labels[chosen],
            masks=None if self.masks is None else self.masks[chosen],
            track_ids=None if self.track_ids is None else self.track_ids[chosen],
        )


@dataclass(frozen=True, slots=True)
class Sample:
    """One annotated image.

    Attributes:
        key: identity that stays the same from training to training (task and data key).
        image: path of the encoded image file.
        boxes: float32 `[N, 4]`, `x1, y1, x2, y2` in pixels of the upright image. `N = 0` is a
            true negative: an image that a person found empty.
        labels: int64 `[N]`, index into the tuple of label names that accompanies the samples.
        size: width and height in pixels of the upright image that `boxes` refer to, where the file
            is a reduced copy of that image; None where the file has this size itself.
        masks: bool `[N, H, W]`, one segmentation mask for each box, in pixels of the upright
            image; None where there are none.
        track_ids: int64 `[N]`, the track that each box belongs to; None where there are none.
    """

    key: str
    image: Path
    boxes: FloatArray
    labels: IntArray
    size: tuple[int, int] | None = None
    masks: BoolArray | None = None
    track_ids: IntArray | None = None

    def where(self, keep: BoolArray) -> Sample:
        """Selects the boxes at which the boolean mask `keep`, `[N]`, is true."""
        return replace(
            self,
            boxes=self.boxes[keep],
            labels=self.labels[keep],
            masks=None if self.masks is None else self.masks[keep],
            track_ids=None if self.track_ids is None else self.track_ids[keep],
        )
