"""Define detectors that learn nothing, in no time, for tests of the code around them."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ml_backend.detection.architectures.torchvision import TorchvisionDetector
from ml_backend.detection.presets import Preset


class _Module(nn.Module):
    """Find one box in an empty corner of each image, so that all versions are equally good."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(outputs))

    def forward(self, images: list[Tensor], targets: Any = None) -> Any:
        if self.training:
            return {"loss": self.weight.square().sum()}
        return [
            {
                "boxes": torch.tensor([[0.0, 0.0, 0.02, 0.02]])
                * torch.tensor([image.shape[2], image.shape[1]] * 2),
                "scores": torch.tensor([0.9]),
                "labels": torch.tensor([1]),
            }
            for image in images
        ]


class _Large(_Module):
    """Have four megabytes of weights."""

    def __init__(self, outputs: int) -> None:
        super().__init__(outputs)
        self.ballast = nn.Parameter(torch.zeros(1 << 20))


class _Hanging(_Module):
    """Never end the first training step."""

    def forward(self, images: list[Tensor], targets: Any = None) -> Any:
        while self.training:
            time.sleep(1)
        return super().forward(images, targets)


class _Stalling(_Module):
    """Be built slowly, and end the first training step only.

    The first step takes longer than the time between two reports of progress, so that it is
    reported. The second step creates the file that `TEST_STALLED` names.
    """

    def __init__(self, outputs: int) -> None:
        super().__init__(outputs)
        self.steps = 0
        time.sleep(BUILT_WITHIN)

    def forward(self, images: list[Tensor], targets: Any = None) -> Any:
        self.steps += self.training
        if self.training and self.steps == 1:
            time.sleep(1.5)
        if self.training and self.steps > 1:
            Path(os.environ["TEST_STALLED"]).touch()
            time.sleep(3600)
        return super().forward(images, targets)


BUILT_WITHIN = 2.0
"""Seconds that `STALLING` takes to be built."""
PRESET = Preset(
    name="stand-in",
    architecture=TorchvisionDetector(_Module),
    min_size=64,
    max_size=96,
    learning_rate=1e-3,
    batch_size=4,
    predict_batch=16,
    steps=2,
    epochs=0,
)
REFERENCE = f"{__name__}:PRESET"
"""The value of `ML_BACKEND_PRESET` for it."""
LARGE = replace(PRESET, name="large", architecture=TorchvisionDetector(_Large))
HANGING = replace(PRESET, name="hanging", architecture=TorchvisionDetector(_Hanging))
STALLING = replace(PRESET, name="stalling", architecture=TorchvisionDetector(_Stalling))
