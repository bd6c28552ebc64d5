"""`tiny` on smaller images and with fewer steps: a quarter of the time, for comparisons.

ML_BACKEND_PRESET=tests.benchmarks.quick:PRESET ml-backend simulate DATASET
"""

from __future__ import annotations

from dataclasses import replace

from ml_backend.detection.presets.tiny import PRESET as TINY

PRESET = replace(TINY, min_size=224, max_size=320, steps=250, epochs=12)
