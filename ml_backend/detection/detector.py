"""A detector: a module that was built by a preset, and the names of what it finds."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ml_backend.detection.calibration import Calibration, calibrate, calibration_from
from ml_backend.detection.embedding import embeddings_of
from ml_backend.detection.presets import (
    LoadedWeights,
    Preset,
    build,
    coco_labels,
    load_weights,
    preset_named,
    transfer,
)
from ml_backend.detection.types import Detections, FloatArray

FLOOR = 0.02
"""Confidence of the network down to which boxes are looked at; thresholds decide what is shown."""
_ENOUGH = 2
"""Times the preset's `max_size` that the longer side of a prepared image has at least, where the
image itself has more."""
_WEIGHTS = "model.safetensors"
_CARD = "detector.json"


class CorruptDetector(ValueError):
    """A saved detector cannot be used; the text names the file."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """An image as a batch takes it: of a size that a batch of any images fits into memory.

    Attributes:
        pixels: uint8 `[H, W, 3]`.
        size: width and height of the image that it was, in pixels.
        factor: how many of its pixels became one, in either direction.
    """

    pixels: npt.NDArray[np.uint8]
    size: tuple[int, int]
    factor: int


class Detector:
    """Finds boxes in images.

    Args:
        preset: what it was built by.
        labels: names of what it finds.
        module: the network, with `len(labels) + 1` outputs.
        weights: what it began with.
        device: where it runs.
        thresholds: calibrated confidence from which a box is worth showing, by label.
        calibration: what makes confidences mean what they say, by label.
    """

    def __init__(
        self,
        preset: Preset,
        labels: Sequence[str],
        module: nn.Module,
        weights: LoadedWeights,
        device: torch.device,
        thresholds: dict[str, float] | None = None,
        calibration: Calibration | None = None,
    ) -> None:
        self.preset = preset
        self.labels = tuple(labels)
        self.weights = weights
        self.device = device
        self.thresholds = thresholds if thresholds is not None else {}
        self.calibration = calibration if calibration is not None else {}
        # Channels-last is faster on CPUs too: `tiny` predicts in 0.8, learns in 0.9 of the time.
        self.module = module.to(device).eval().to(memory_format=torch.channels_last)

    @classmethod
    def pretrained(
        cls, preset: Preset, labels: Sequence[str], weights: str, device: torch.device
    ) -> Detector:
        """A detector that has learned nothing of its labels yet.

        COCO's labels of the same name start from what COCO's weights know of them.

        Args:
            preset: what to build.
            labels: names of what it is to find.
            weights: `auto`, `none` or a file; see `zoo.load_weights`.
            device: where it runs.

        Raises:
            ValueError: the file of weights does not fit.
        """
        outputs = len(labels) + 1
        known = coco_labels(preset)
        if weights == "auto" and known is not None:
            donor = build(preset, len(known) + 1)
            loaded = load_weights(donor, preset, weights, len(known) + 1)
            if loaded.kind == "coco":
                module = build(preset, outputs)
                state = transfer(donor.state_dict(), module.state_dict(), known, tuple(labels))
                module.load_state_dict(state)
                return cls(preset, labels, module, loaded, device)
            return cls(preset, labels, build(preset, outputs), loaded, device)
        module = build(preset, outputs)
        loaded = load_weights(module, preset, weights, outputs)
        return cls(preset, labels, module, loaded, device)

    @classmethod
    def coco(cls, preset: Preset, device: torch.device) -> Detector | None:
        """COCO's detector with COCO's names, where its weights can be had; None otherwise."""
        known = coco_labels(preset)
        if known is None:
            return None
        module = build(preset, len(known) + 1)
        loaded = load_weights(module, preset, "auto", len(known) + 1)
        return cls(preset, known, module, loaded, device) if loaded.kind == "coco" else None

    def with_labels(self, labels: Sequence[str]) -> Detector:
        """The same detector for other labels: those in both are kept, new ones know nothing."""
        module = build(self.preset, len(labels) + 1)
        state = transfer(
            self.module.state_dict(),
            module.to(self.device).state_dict(),
            self.labels,
            tuple(labels),
        )
        module.load_state_dict(state)
        thresholds = {k: v for k, v in self.thresholds.items() if k in labels}
        calibration = {k: v for k, v in self.calibration.items() if k in labels}
        return Detector(
            self.preset, labels, module, self.weights, self.device, thresholds, calibration
        )

    def prepare(self, image: Image.Image | np.ndarray[Any, Any]) -> Prepared:
        """Shrinks an image that is far larger than what the network looks at.

        Args:
            image: RGB, uint8: a Pillow image or an `[H, W, 3]` array.
        """
        picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
        most = self.preset.max_size
        factor = max(1, max(picture.size) // (_ENOUGH * most))
        pixels = np.array(picture.reduce(factor), np.uint8)
        # The network shrinks it once more: of a strip a few pixels wide nothing would be left.
        least = max(pixels.shape[:2]) // most + 1
        lacking = [max(0, least - side) for side in pixels.shape[:2]]
        if any(lacking):
            pixels = np.pad(pixels, [(0, lacking[0]), (0, lacking[1]), (0, 0)], mode="edge")
        return Prepared(pixels, picture.size, factor)

    @torch.inference_mode()
    def predict(
        self,
        images: Sequence[Image.Image | np.ndarray[Any, Any] | Prepared],
        *,
        floor: float = FLOOR,
    ) -> list[Detections]:
        """Finds boxes in a batch of images, in one forward pass.

        Args:
            images: RGB, uint8, any sizes: Pillow images, `[H, W, 3]` arrays, or prepared ones.
            floor: boxes of which the network is less sure are left out.

        Returns:
            For each image its detections, most confident first, in its own pixels, confidences
            calibrated; and its embedding.
        """
        if not images:
            return []
        prepared = [i if isinstance(i, Prepared) else self.prepare(i) for i in images]
        tensors = [self._to_tensor(image.pixels) for image in prepared]
        with (
            embeddings_of(self.module) as seen,
            torch.autocast(
                self.device.type, dtype=torch.float16, enabled=self.device.type == "cuda"
            ),
        ):
            outputs = self.module(tensors)
        return [
            self._detections(output, floor, seen.rows[i] if seen.rows else None, image)
            for i, (output, image) in enumerate(zip(outputs, prepared, strict=True))
        ]

    def save(self, folder: Path) -> None:
        """Writes `model.safetensors` and `detector.json` into a folder."""
        state = {k: v.detach().cpu().contiguous() for k, v in self.module.state_dict().items()}
        save_file(state, folder / _WEIGHTS)
        card = {
            "preset": self.preset.reference,
            "labels": list(self.labels),
            "weights": dataclasses.asdict(self.weights),
            "thresholds": self.thresholds,
            "calibration": {
                label: dataclasses.asdict(curve) for label, curve in self.calibration.items()
            },
        }
        (folder / _CARD).write_text(json.dumps(card, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, device: torch.device) -> Detector:
        """Reads a detector that `save` wrote.

        Raises:
            CorruptDetector: a file is missing, damaged, or of another preset than it says.
        """
        try:
            card = json.loads((folder / _CARD).read_text(encoding="utf-8"))
            preset = preset_named(card["preset"], device)
            labels = tuple(card["labels"])
            module = build(preset, len(labels) + 1)
            module.load_state_dict(load_file(folder / _WEIGHTS))
            return cls(
                preset,
                labels,
                module,
                LoadedWeights(**card["weights"]),
                device,
                {str(k): float(v) for k, v in card["thresholds"].items()},
                calibration_from(card["calibration"]),
            )
        except (
            OSError,
            ValueError,
            LookupError,
            TypeError,
            AttributeError,
            RuntimeError,
            SafetensorError,
        ) as error:
            raise CorruptDetector(f"{folder} holds no usable detector: {error}") from error

    def _to_tensor(self, pixels: npt.NDArray[np.uint8]) -> torch.Tensor:
        tensor = torch.from_numpy(pixels).permute(2, 0, 1)
        return tensor.to(self.device, non_blocking=True).float().div_(255)

    def _detections(
        self,
        output: dict[str, torch.Tensor],
        floor: float,
        embedding: FloatArray | None,
        image: Prepared,
    ) -> Detections:
        labels = output["labels"].cpu().numpy() - 1
        scores = output["scores"].float().cpu().numpy()
        boxes = output["boxes"].float().cpu().numpy()
        # Back to the image's own pixels, and within it.
        boxes = np.minimum(boxes * image.factor, np.array(image.size * 2, np.float32))
        # Output 0 is nobody's label; a box without an area shows nothing.
        area = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        keep = (labels >= 0) & (scores >= floor) & area
        found = Detections(
            boxes[keep].astype(np.float32),
            scores[keep].astype(np.float32),
            labels[keep].astype(np.int64),
            embedding,
            image.size,
        )
        return calibrate(found.ranked(), self.labels, self.calibration)
