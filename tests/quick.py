"""A preset whose training takes a second, for tests of what is around it.

While there is a file of the name in `TEST_HOLD`, its trainings wait.
"""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

from torch import nn

from ml_backend.detection.presets import PRESETS, fcos_shufflenet


def _build(outputs: int) -> nn.Module:
    while "TEST_HOLD" in os.environ and Path(os.environ["TEST_HOLD"]).exists():
        time.sleep(0.05)
    return fcos_shufflenet(outputs)


PRESET = replace(
    PRESETS["tiny"], name="quick", build=_build, min_size=64, max_size=96, steps=4, epochs=1
)
