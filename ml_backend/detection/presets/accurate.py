"""`accurate`: for a GPU."""

from __future__ import annotations

from torchvision.models import ResNet50_Weights
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_V2_Weights

from ml_backend.detection.architectures.faster_rcnn import faster_rcnn_resnet50
from ml_backend.detection.architectures.torchvision import TorchvisionDetector
from ml_backend.detection.presets import Preset

PRESET = Preset(
    name="accurate",
    architecture=TorchvisionDetector(
        faster_rcnn_resnet50,
        backbone=ResNet50_Weights.IMAGENET1K_V2,
        coco=FasterRCNN_ResNet50_FPN_V2_Weights.COCO_V1,
    ),
    min_size=800,
    max_size=1333,
    learning_rate=1e-4,
    batch_size=8,
    predict_batch=16,
    steps=600,
    epochs=24,
)
