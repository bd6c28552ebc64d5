"""`small`: knows COCO's labels from the start, and runs on a CPU too."""

from __future__ import annotations

from torchvision.models import MobileNet_V3_Large_Weights
from torchvision.models.detection import FasterRCNN_MobileNet_V3_Large_320_FPN_Weights

from ml_backend.detection.architectures.faster_rcnn import faster_rcnn_mobilenet
from ml_backend.detection.architectures.torchvision import TorchvisionDetector
from ml_backend.detection.presets import Preset

PRESET = Preset(
    name="small",
    architecture=TorchvisionDetector(
        faster_rcnn_mobilenet,
        backbone=MobileNet_V3_Large_Weights.IMAGENET1K_V1,
        coco=FasterRCNN_MobileNet_V3_Large_320_FPN_Weights.COCO_V1,
    ),
    min_size=320,
    max_size=640,
    learning_rate=5e-4,
    batch_size=8,
    predict_batch=16,
    steps=400,
    epochs=30,
)
