"""FCOS (Tian et al., 2019) over a feature pyramid of strides 8, 16 and 32, for CPUs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torchvision.models import shufflenet_v2_x0_5
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.fcos import FCOSHead
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, FeaturePyramidNetwork

from ml_backend.detection.architectures.efficientnet_lite import (
    CHANNELS,
    MEAN,
    SPREAD,
    EfficientNetLite,
)

INITIAL_DISTANCE = 2.0
"""Distance to a box's sides, in strides, that a new network begins with: a level's typical one."""
_PYRAMID = 64
"""Channels of the feature pyramid."""
FROZEN = 5
"""Stages of EfficientNet-Lite0, of 7, that do not learn."""


def fcos_shufflenet(outputs: int) -> nn.Module:
    """Builds FCOS on ShuffleNetV2 x0.5 (Ma et al., 2018); 0.6 M parameters."""
    trunk = shufflenet_v2_x0_5(weights=None)
    body = nn.Sequential()
    for name in ("conv1", "maxpool", "stage2", "stage3", "stage4"):
        body.add_module(name, getattr(trunk, name))
    backbone = BackboneWithFPN(
        body,
        return_layers={"stage2": "0", "stage3": "1", "stage4": "2"},
        in_channels_list=[48, 96, 192],
        out_channels=_PYRAMID,
        extra_blocks=_NoExtraLevels(),
    )
    return _fcos(backbone, outputs)


def fcos_efficientnet_lite(outputs: int) -> nn.Module:
    """Builds FCOS on EfficientNet-Lite0, whose first stages do not learn; 3.6 M parameters."""
    return _fcos(_EfficientNetPyramid(), outputs, image_mean=[MEAN] * 3, image_std=[SPREAD] * 3)


def _fcos(backbone: nn.Module, outputs: int, **normalisation: Sequence[float]) -> nn.Module:
    anchors = AnchorGenerator(sizes=((8,), (16,), (32,)), aspect_ratios=((1.0,),) * 3)
    head = FCOSHead(_PYRAMID, 1, outputs, num_convs=2)
    # The distances to a box's sides pass a ReLU. A zero bias can leave this ReLU dead on one side
    # (1 of 12 runs): no gradient reaches it, and no box is ever right.
    nn.init.constant_(head.regression_head.bbox_reg.bias, INITIAL_DISTANCE)
    module: nn.Module = FCOS(
        backbone, outputs, anchor_generator=anchors, head=head, score_thresh=0.01, **normalisation
    )
    return module


class _EfficientNetPyramid(nn.Module):
    """A feature pyramid on EfficientNet-Lite0."""

    def __init__(self) -> None:
        super().__init__()
        self.body = EfficientNetLite(FROZEN)
        self.fpn = FeaturePyramidNetwork(list(CHANNELS), _PYRAMID)
        self.out_channels = _PYRAMID

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features: dict[str, Tensor] = self.fpn(self.body(images))
        return features


class _NoExtraLevels(ExtraFPNBlock):  # type: ignore[misc]
    """Replaces torchvision's default of pooling one more level, which costs time and adds none."""

    def forward(
        self, results: list[Tensor], x: list[Tensor], names: list[str]
    ) -> tuple[list[Tensor], list[str]]:
        return results, names
