"""`tiny` with fewer steps, for comparisons in which both sides pay the same for it.

ML_BACKEND_PRESET=tests.benchmarks.quick:PRESET ml-backend simulate DATASET
"""

from __future__ import annotations

from dataclasses import replace

from ml_backend.detection.zoo import PRESETS

PRESET = replace(PRESETS["tiny"], steps=350, epochs=20)
