"""`tiny` on smaller images and with fewer steps: a quarter of the time, for comparisons.

ML_BACKEND_PRESET=tests.benchmarks.quick:PRESET ml-backend simulate DATASET
"""

from __future__ import annotations

from dataclasses import replace

from ml_backend.detection.presets import PRESETS

PRESET = replace(PRESETS["tiny"], min_size=224, max_size=320, steps=250, epochs=12)
