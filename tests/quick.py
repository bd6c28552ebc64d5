"""A preset whose training takes a second, for tests of what is around it.

Its trainings wait while the file that `TEST_HOLD` names exists.
"""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

from torch import nn

from ml_backend.detection.architectures.fcos_shufflenet import fcos_shufflenet
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
