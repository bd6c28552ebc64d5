"""Keeps the features of annotated images, so that a live head is fitted without computing them."""

from __future__ import annotations

import hashlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ml_backend.detection.architectures.cells import CellNet, resized_to
from ml_backend.detection.decoding import image_size
from ml_backend.detection.loading import read_example
from ml_backend.detection.presets import Preset
from ml_backend.detection.types import Sample

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Features:
    """The features of an image and of its mirror image.

    Attributes:
        plain: one `[1, C, h, w]` a stride, finest first, float32.
        mirrored: those of the mirror image.
        size: width and height of the image, in pixels.
    """

    plain: list[Tensor]
    mirrored: list[Tensor]
    size: tuple[int, int]


class FeatureCache:
    """Computes features of images, and keeps them in a folder.

    Args:
        folder: receives a file for each image; None keeps nothing.
        preset: of the detector whose trunk computes them.
        trunk: what its weights are, in words; features of another trunk are computed anew.
        module: the network.
        max_pixels: larger images are refused.
    """

    def __init__(
        self, folder: Path | None, preset: Preset, trunk: str, module: CellNet, *, max_pixels: int
    ) -> None:
        self._folder = folder
        self._preset = preset
        self._trunk = trunk
        self._module = module
        self._max_pixels = max_pixels
        self._used: set[str] = set()

    def of(self, sample: Sample) -> Features:
        """Answers the features of a sample's image.

        Raises:
            UndecodableImage, OSError: the image cannot be read.
        """
        path = self._path(sample)
        if path is not None and path.is_file():
            try:
                return _features(load_file(path))
            except (SafetensorError, OSError, LookupError, ValueError) as error:
                # A process that was killed, or a full disk, may leave half a file.
                _log.warning("%s is damaged, and computed anew: %s", path, error)
        tensors = self._compute(sample)
        if path is not None:
            try:
                self._keep(path, tensors)
            except (OSError, SafetensorError) as error:
                # The disk is full, or another job has just deleted what it did not need.
                _log.warning("features are computed again next time: %s", error)
        return _features(tensors)

    def forget_others(self) -> None:
        """Deletes the features of images that were not asked for."""
        if self._folder is None or not self._folder.is_dir():
            return
        for file in self._folder.iterdir():
            if file.name not in self._used:
                file.unlink(missing_ok=True)

    @staticmethod
    def _keep(path: Path, tensors: dict[str, Tensor]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        save_file(tensors, part)
        part.replace(path)

    def _path(self, sample: Sample) -> Path | None:
        if self._folder is None:
            return None
        mark = hashlib.sha256(f"{self._trunk} {self._preset.input_size} {sample.size}".encode())
        mark.update(sample.image.read_bytes())
        name = f"{mark.hexdigest()}.safetensors"
        self._used.add(name)
        return self._folder / name

    def _compute(self, sample: Sample) -> dict[str, Tensor]:
        example = read_example(
            sample, longest=self._preset.longest_side, max_pixels=self._max_pixels
        )
        image = resized_to(example.image.float() / 255, self._preset.input_size)
        batch = torch.stack([image, image.flip(-1)]).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            found = self._module.features(batch)
        # Half the bytes: the fit does not notice.
        tensors = {f"features.{i}": f.half().contiguous() for i, f in enumerate(found)}
        size = sample.size or image_size(sample.image, max_pixels=self._max_pixels)
        return tensors | {"size": torch.tensor(size)}


def _features(tensors: dict[str, Tensor]) -> Features:
    strides = [tensors[f"features.{i}"].float() for i in range(len(tensors) - 1)]
    width, height = tensors["size"].tolist()
    return Features([f[:1] for f in strides], [f[1:] for f in strides], (width, height))
