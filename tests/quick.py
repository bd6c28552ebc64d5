"""Define presets whose trainings are short.

While a file of the name in `TEST_HOLD` exists, their trainings wait.
"""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

from torch import nn

from ml_backend.detection.architectures.fcos import fcos_shufflenet
from ml_backend.detection.architectures.torchvision import TorchvisionDetector
from ml_backend.detection.presets.tiny import PRESET as TINY


def _build(outputs: int) -> nn.Module:
    while "TEST_HOLD" in os.environ and Path(os.environ["TEST_HOLD"]).exists():
        time.sleep(0.05)
    return fcos_shufflenet(outputs)


PRESET = replace(
    TINY,
    name="quick",
    architecture=TorchvisionDetector(_build),
    min_size=64,
    max_size=96,
    steps=4,
    epochs=1,
)
"""Trains for a second and learns nothing, for tests of the code around a training."""
LEARNING = replace(
    PRESET, name="learning", min_size=128, max_size=176, learning_rate=3e-3, steps=1200
)
"""Learns shapes on images of 128 x 96 pixels from scratch, in three minutes of CPU time: from 160
images it reached an AP50 of 0.92 on 150 others."""
