"""Faster R-CNN (Ren et al., 2015) of torchvision, with a low score threshold."""

from __future__ import annotations

from torch import nn
from torchvision.models.detection import (
    fasterrcnn_mobilenet_v3_large_320_fpn,
    fasterrcnn_resnet50_fpn_v2,
)

_SCORE = 0.01
"""Confidence down to which boxes are found; the thresholds of a detector decide later."""


def faster_rcnn_mobilenet(outputs: int) -> nn.Module:
    """Builds Faster R-CNN on MobileNetV3-Large (Howard et al., 2019); 19 M parameters."""
    module: nn.Module = fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=outputs, box_score_thresh=_SCORE
    )
    return module


def faster_rcnn_resnet50(outputs: int) -> nn.Module:
    """Builds Faster R-CNN on ResNet-50 with FPN, v2 (Li et al., 2021); 44 M parameters."""
    module: nn.Module = fasterrcnn_resnet50_fpn_v2(
        weights=None, weights_backbone=None, num_classes=outputs, box_score_thresh=_SCORE
    )
    return module
