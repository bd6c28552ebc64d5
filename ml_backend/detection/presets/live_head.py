"""`live`: a head on a frozen trunk, fitted within seconds, from the third annotated image on.

`ml_backend.training.live_head` makes its versions; nothing of it is trained by gradient descent, so
that no setting names it.
"""

from __future__ import annotations

from ml_backend.detection.architectures.cells import CellDetector
from ml_backend.detection.presets import Preset

PRESET = Preset(
    name="live",
    architecture=CellDetector(),
    min_size=320,
    max_size=448,
    learning_rate=0.0,
    batch_size=1,
    predict_batch=8,
    steps=0,
    epochs=0,
    source="ml_backend.detection.presets.live_head:PRESET",
)
