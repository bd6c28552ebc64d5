"""A detector: a network built by a preset, and the names of the labels that it finds."""

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

from ml_backend.detection.architectures.base import Found, LoadedWeights
from ml_backend.detection.calibration import Calibration, calibrate, calibration_from
from ml_backend.detection.presets import Preset, preset_named
from ml_backend.detection.types import Detections

FLOOR = 0.02
"""Confidence of the network down to which boxes are looked at; thresholds decide what is shown."""
_WEIGHTS = "model.safetensors"
_CARD = "detector.json"


class CorruptDetector(ValueError):
    """A saved detector cannot be used; the text names the file."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """An image reduced to a size at which a batch of any images fits into memory.

    Attributes:
        pixels: uint8 `[H, W, 3]`.
        size: width and height of the original image, in pixels.
        factor: pixels of the original that became one, horizontally and vertically.
    """

    pixels: npt.NDArray[np.uint8]
    size: tuple[int, int]
    factor: tuple[float, float]

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it takes."""
        return self.pixels.nbytes


class Detector:
    """Finds boxes in images.

    Args:
        preset: what it was built by.
        labels: names of the labels that it finds.
        module: the network, made by the preset's architecture for these labels.
        weights: the weights that it began with.
        device: where it runs.
        thresholds: calibrated confidence from which a box is worth showing, by label.
        calibration: curves that calibrate confidences, by label.
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
        """Makes a detector that has not been trained on its labels yet.

        Labels that the published weights know by the same name start from their rows.

        Args:
            preset: the preset to build.
            labels: names of the labels to find.
            weights: `auto`, `none` or a file; see `Architecture.pretrained`.
            device: where it runs.

        Raises:
            WeightsError: the file of weights does not fit.
        """
        module, loaded = preset.architecture.pretrained(tuple(labels), weights)
        return cls(preset, labels, module, loaded, device)

    @classmethod
    def coco(cls, preset: Preset, device: torch.device) -> Detector | None:
        """Makes the detector of COCO's labels; None where its weights cannot be had."""
        known, published = preset.architecture.published_labels, preset.architecture.published()
        if known is None or published is None:
            return None
        return cls(preset, known, *published, device)

    def with_labels(self, labels: Sequence[str]) -> Detector:
        """Makes a copy for other labels: labels in both are kept, new ones start anew."""
        module = self.preset.architecture.with_labels(self.module, self.labels, tuple(labels))
        thresholds = {k: v for k, v in self.thresholds.items() if k in labels}
        calibration = {k: v for k, v in self.calibration.items() if k in labels}
        return Detector(
            self.preset, labels, module, self.weights, self.device, thresholds, calibration
        )

    def shrink_and_perturb(self) -> None:
        """Prepares the network to be trained on; see `Architecture.shrink_and_perturb`."""
        self.preset.architecture.shrink_and_perturb(self.module)

    def prepare(
        self,
        image: Image.Image | np.ndarray[Any, Any],
        *,
        size: tuple[int, int] | None = None,
    ) -> Prepared:
        """Reduces an image that is far larger than the size at which the network sees images.

        Args:
            image: RGB, uint8: a Pillow image or an `[H, W, 3]` array.
            size: width and height of the original in pixels, where `image` is a reduced copy.
        """
        return prepare(self.preset, image, size=size)

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
            floor: boxes with a lower confidence of the network are left out.

        Returns:
            For each image its detections, most confident first, in pixels of the original image,
            with calibrated confidences; and its embedding.
        """
        if not images:
            return []
        prepared = [i if isinstance(i, Prepared) else self.prepare(i) for i in images]
        tensors = [self._to_tensor(image.pixels) for image in prepared]
        with torch.autocast(
            self.device.type, dtype=torch.float16, enabled=self.device.type == "cuda"
        ):
            outputs = self.preset.architecture.detect(self.module, tensors, self.preset.input_size)
        return [
            self._detections(output, floor, image)
            for output, image in zip(outputs, prepared, strict=True)
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
            module = preset.architecture.build(len(labels))
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

    def _detections(self, output: Found, floor: float, image: Prepared) -> Detections:
        labels = output.labels.cpu().numpy()
        scores = output.scores.float().cpu().numpy()
        boxes = output.boxes.float().cpu().numpy()
        # Back to the original's pixels, and within it.
        boxes = np.minimum(
            boxes * np.array(image.factor * 2, np.float32), np.array(image.size * 2, np.float32)
        )
        # A box without an area shows nothing.
        area = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        keep = (scores >= floor) & area
        found = Detections(
            boxes[keep].astype(np.float32),
            scores[keep].astype(np.float32),
            labels[keep].astype(np.int64),
            output.embedding,
            image.size,
        )
        return calibrate(found.ranked(), self.labels, self.calibration)


def prepare(
    preset: Preset,
    image: Image.Image | np.ndarray[Any, Any],
    *,
    size: tuple[int, int] | None = None,
) -> Prepared:
    """Reduces an image for detectors of a preset, as `Detector.prepare` does."""
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    factor = max(1, max(picture.size) // preset.longest_side)
    reduced = picture.reduce(factor)
    pixels = np.array(reduced, np.uint8)
    original = size if size is not None else picture.size
    if size is None or size == picture.size:
        scale: tuple[float, float] = (factor, factor)
    else:
        scale = (original[0] / reduced.width, original[1] / reduced.height)
    # The network shrinks it once more: of a strip a few pixels wide nothing would be left.
    least = max(pixels.shape[:2]) // preset.max_size + 1
    lacking = [max(0, least - side) for side in pixels.shape[:2]]
    if any(lacking):
        pixels = np.pad(pixels, [(0, lacking[0]), (0, lacking[1]), (0, 0)], mode="edge")
    return Prepared(pixels, original, scale)
