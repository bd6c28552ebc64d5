"""FCOS on ShuffleNetV2: a detector of 0.6 M parameters, for CPUs."""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.models import shufflenet_v2_x0_5
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.fcos import FCOSHead
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

INITIAL_DISTANCE = 2.0
"""Distance to a box's sides, in strides, that a new network begins with: a level's typical one."""


def fcos_shufflenet(outputs: int) -> nn.Module:
    """Builds FCOS (Tian et al., 2019) over an FPN on ShuffleNetV2 x0.5 (Ma et al., 2018).

    The FPN has 64 channels and levels of stride 8, 16 and 32.
    """
    trunk = shufflenet_v2_x0_5(weights=None)
    body = nn.Sequential()
    for name in ("conv1", "maxpool", "stage2", "stage3", "stage4"):
        body.add_module(name, getattr(trunk, name))
    backbone = BackboneWithFPN(
        body,
        return_layers={"stage2": "0", "stage3": "1", "stage4": "2"},
        in_channels_list=[48, 96, 192],
        out_channels=64,
        extra_blocks=_NoExtraLevels(),
    )
    anchors = AnchorGenerator(sizes=((8,), (16,), (32,)), aspect_ratios=((1.0,),) * 3)
    head = FCOSHead(64, 1, outputs, num_convs=2)
    # The distances to a box's sides pass a ReLU. A zero bias can leave this ReLU dead on one side
    # (1 of 12 runs): no gradient reaches it, and no box is ever right.
    nn.init.constant_(head.regression_head.bbox_reg.bias, INITIAL_DISTANCE)
    module: nn.Module = FCOS(
        backbone, outputs, anchor_generator=anchors, head=head, score_thresh=0.01
    )
    return module


class _NoExtraLevels(ExtraFPNBlock):  # type: ignore[misc]
    """Replaces torchvision's default of pooling one more level, which costs time and adds none."""

    def forward(
        self, results: list[Tensor], x: list[Tensor], names: list[str]
    ) -> tuple[list[Tensor], list[str]]:
        return results, names
