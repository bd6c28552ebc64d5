"""`tiny`: learns in minutes on a laptop's CPU."""

from __future__ import annotations

from torchvision.models import ShuffleNet_V2_X0_5_Weights

from ml_backend.detection.architectures.fcos import fcos_shufflenet
from ml_backend.detection.architectures.torchvision import TorchvisionDetector
from ml_backend.detection.presets import Preset

PRESET = Preset(
    name="tiny",
    architecture=TorchvisionDetector(
        fcos_shufflenet, backbone=ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1
    ),
    min_size=320,
    max_size=448,
    learning_rate=2e-3,
    batch_size=8,
    predict_batch=8,
    steps=800,
    epochs=40,
)
