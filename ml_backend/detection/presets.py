"""Presets: small declarations of detectors. Add one to `PRESETS`, or give an import path to yours.

Every detector follows torchvision's protocol: in training it maps images and targets to a dict of
losses, otherwise images to dicts of `boxes`, `scores` and `labels`. Output 0 is the background
(FCOS leaves it unused), output `i + 1` is label `i`.
"""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Literal
from urllib.error import URLError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models import (
    MobileNet_V3_Large_Weights,
    ResNet50_Weights,
    ShuffleNet_V2_X0_5_Weights,
    WeightsEnum,
    shufflenet_v2_x0_5,
)
from torchvision.models.detection import (
    FCOS,
    FasterRCNN_MobileNet_V3_Large_320_FPN_Weights,
    FasterRCNN_ResNet50_FPN_V2_Weights,
    fasterrcnn_mobilenet_v3_large_320_fpn,
    fasterrcnn_resnet50_fpn_v2,
)
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.fcos import FCOSHead
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

_log = logging.getLogger(__name__)

State = Mapping[str, Tensor]

FCOS_DISTANCE = 2.0
"""Distance to a box's sides, in strides, that a new FCOS begins with: a level's typical one."""

_NAME = re.compile(r"[\w.:+-]{1,64}")


@dataclass(frozen=True, slots=True)
class Preset:
    """How to build, feed and train a detector.

    Attributes:
        name: short; part of version names.
        build: makes the module for a number of outputs (labels and background), without weights.
        min_size: the shorter side of an image is scaled to it, in pixels,
        max_size: unless the longer side would exceed this.
        learning_rate: peak of the schedule, for AdamW; the pretrained trunk learns at half of it.
        batch_size: images in a training step.
        predict_batch: images predicted together at most.
        steps: training steps,
        epochs: or passes over the images, whichever is more. A pretrained detector takes fewer
            steps while there are few images.
        backbone: torchvision's weights of the trunk, and
        coco: of the whole detector, where there are any.
        trunk: prefix of the trunk's names in the module's state.
        source: import path that it was found by; `preset_named` fills it in.
    """

    name: str
    build: Callable[[int], nn.Module]
    min_size: int
    max_size: int
    learning_rate: float
    batch_size: int
    predict_batch: int
    steps: int
    epochs: int
    backbone: WeightsEnum | None = None
    coco: WeightsEnum | None = None
    trunk: str = "backbone.body."
    source: str = field(default="", compare=False)

    @property
    def reference(self) -> str:
        """What `preset_named` finds it by again."""
        return self.source or self.name


@dataclass(frozen=True, slots=True)
class LoadedWeights:
    """What a detector began with: `kind` for programs, `detail` for people."""

    kind: Literal["coco", "backbone", "file", "none"]
    detail: str


def fcos_shufflenet(outputs: int) -> nn.Module:
    """FCOS (Tian et al., 2019) over an FPN of 64 channels on ShuffleNetV2 x0.5 (Ma et al., 2018).

    0.6 M parameters; levels of stride 8, 16 and 32.
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
    # The distances to a box's sides pass a ReLU. Begun at nought, in one training of a dozen a side
    # stayed below it everywhere, where no gradient reaches it, and no box was ever right.
    nn.init.constant_(head.regression_head.bbox_reg.bias, FCOS_DISTANCE)
    module: nn.Module = FCOS(
        backbone, outputs, anchor_generator=anchors, head=head, score_thresh=0.01
    )
    return module


def faster_rcnn_mobilenet(outputs: int) -> nn.Module:
    """Faster R-CNN (Ren et al., 2015) on MobileNetV3-Large (Howard et al., 2019); 19 M."""
    module: nn.Module = fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=outputs
    )
    module.roi_heads.score_thresh = 0.01  # type: ignore[union-attr]
    return module


def faster_rcnn_resnet50(outputs: int) -> nn.Module:
    """Faster R-CNN with ResNet-50 and FPN, v2 (Li et al., 2021); 44 M parameters."""
    module: nn.Module = fasterrcnn_resnet50_fpn_v2(
        weights=None, weights_backbone=None, num_classes=outputs
    )
    module.roi_heads.score_thresh = 0.01  # type: ignore[union-attr]
    return module


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            name="tiny",
            build=fcos_shufflenet,
            min_size=320,
            max_size=448,
            learning_rate=2e-3,
            batch_size=8,
            predict_batch=8,
            steps=800,
            epochs=40,
            backbone=ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1,
        ),
        Preset(
            name="small",
            build=faster_rcnn_mobilenet,
            min_size=320,
            max_size=640,
            learning_rate=5e-4,
            batch_size=8,
            predict_batch=16,
            steps=400,
            epochs=30,
            backbone=MobileNet_V3_Large_Weights.IMAGENET1K_V1,
            coco=FasterRCNN_MobileNet_V3_Large_320_FPN_Weights.COCO_V1,
        ),
        Preset(
            name="accurate",
            build=faster_rcnn_resnet50,
            min_size=800,
            max_size=1333,
            learning_rate=1e-4,
            batch_size=8,
            predict_batch=16,
            steps=600,
            epochs=24,
            backbone=ResNet50_Weights.IMAGENET1K_V2,
            coco=FasterRCNN_ResNet50_FPN_V2_Weights.COCO_V1,
        ),
    )
}


def preset_named(name: str, device: torch.device) -> Preset:
    """The preset of a setting.

    Args:
        name: `auto` (accurate on a GPU, tiny on a CPU), a name in `PRESETS`, or the import path
            of a `Preset`, `package.module:attribute`.
        device: where it will run.

    Raises:
        ValueError: there is no such preset; the text names those there are.
    """
    if name == "auto":
        name = "accurate" if device.type == "cuda" else "tiny"
    if name in PRESETS:
        return PRESETS[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ValueError(
            f"there is no preset {name!r}: it must be auto, {', '.join(PRESETS)}, or an import "
            "path, package.module:attribute"
        )
    try:
        preset = getattr(importlib.import_module(module), attribute)
    except Exception as error:
        # Whatever somebody's module raises.
        raise ValueError(
            f"the preset {name!r} cannot be imported ({_first_line(error)}): install its package, "
            "or put its folder into PYTHONPATH"
        ) from error
    if not isinstance(preset, Preset):
        raise ValueError(f"{name!r} is not a Preset (ml_backend.detection.presets.Preset)")
    return replace(preset, source=name)


def check(preset: str, weights: str, device: torch.device) -> None:
    """Makes sure that trainings can begin as set: builds the preset, and fits a file of weights.

    Args:
        preset: `ML_BACKEND_PRESET`.
        weights: `ML_BACKEND_WEIGHTS`; nothing is downloaded.
        device: where trainings run; it decides what `auto` is, all is built on the CPU.

    Raises:
        ValueError: they cannot; one line that names the setting.
    """
    try:
        chosen = preset_named(preset, device)
        if not _NAME.fullmatch(chosen.name):
            raise ValueError(f"the name {chosen.name!r} of {preset} cannot be part of a file name")
    except ValueError as error:
        raise ValueError(f"ML_BACKEND_PRESET: {error}") from error
    try:
        module = build(chosen, 2)
    except Exception as error:
        raise ValueError(
            f"ML_BACKEND_PRESET: {preset} cannot be built: {_first_line(error)}"
        ) from error
    if weights not in {"auto", "none"}:
        try:
            load_weights(module, chosen, weights, 2)
        except ValueError as error:
            raise ValueError(f"ML_BACKEND_WEIGHTS: {error}") from error


def build(preset: Preset, outputs: int) -> nn.Module:
    """Makes a preset's module, without weights, set to the preset's image size."""
    module = preset.build(outputs)
    transform = module.transform
    transform.min_size = (preset.min_size,)  # type: ignore[union-attr]
    transform.max_size = preset.max_size  # type: ignore[union-attr]
    return module


def load_weights(module: nn.Module, preset: Preset, weights: str, outputs: int) -> LoadedWeights:
    """Fills a new module with pretrained weights.

    Args:
        module: of the preset, with `outputs` outputs.
        preset: what it is.
        weights: `none`, `auto` (torchvision's, downloaded once: of the whole detector where there
            are any, or else of the trunk), or a file of a trunk's or a detector's state.
        outputs: number of outputs.

    Returns:
        What was loaded; `none`, and a warning in the log, where a download was not possible.

    Raises:
        ValueError: nothing in the file fits.
    """
    if weights == "none":
        return LoadedWeights("none", "no pretrained weights, as set")
    if weights != "auto":
        return _load_from_file(module, preset, Path(weights))
    kinds: tuple[tuple[Literal["coco", "backbone"], WeightsEnum | None], ...] = (
        ("coco", preset.coco),
        ("backbone", preset.backbone),
    )
    for kind, enum in kinds:
        if enum is None:
            continue
        try:
            state = enum.get_state_dict(progress=False, check_hash=True)
        except (URLError, OSError, RuntimeError) as error:
            detail = f"{enum} cannot be downloaded ({error})"
            _log.warning("%s", detail)
            return LoadedWeights("none", detail)
        _fill(module, state, "" if kind == "coco" else preset.trunk)
        return LoadedWeights(kind, str(enum))
    return LoadedWeights("none", f"torchvision has no weights for {preset.name}")


def coco_labels(preset: Preset) -> tuple[str, ...] | None:
    """Names of the outputs of the preset's COCO weights, background left out."""
    if preset.coco is None:
        return None
    return tuple(preset.coco.meta["categories"][1:])


def transfer(
    old: State, new: State, old_labels: tuple[str, ...], new_labels: tuple[str, ...]
) -> dict[str, Tensor]:
    """State of a detector for other labels: what was learned of the labels in both is kept.

    Args:
        old: state of a detector of `old_labels`.
        new: state of a fresh detector of `new_labels`, same preset; gives what `old` lacks.
        old_labels: label names of `old`.
        new_labels: label names of `new`.

    Returns:
        A state of the shapes of `new`. Tensors that have rows for each output are put together
        by label, the others come from `old`.
    """
    result: dict[str, Tensor] = {}
    outputs = len(old_labels) + 1, len(new_labels) + 1
    kept = [
        (old_labels.index(label), i) for i, label in enumerate(new_labels) if label in old_labels
    ]
    for name, fresh in new.items():
        known = old.get(name)
        if known is None:
            result[name] = fresh
        elif known.shape == fresh.shape and old_labels == new_labels:
            result[name] = known
        elif (
            known.shape[1:] == fresh.shape[1:]
            and known.ndim > 0
            and known.shape[0] * outputs[1] == fresh.shape[0] * outputs[0]
            and _has_row_per_output(name)
        ):
            rows = fresh.clone().reshape(outputs[1], -1, *fresh.shape[1:])
            source = known.reshape(outputs[0], -1, *known.shape[1:])
            rows[0] = source[0]
            for before, after in kept:
                rows[after + 1] = source[before + 1]
            result[name] = rows.reshape(fresh.shape)
        else:
            result[name] = known if known.shape == fresh.shape else fresh
    return result


def _has_row_per_output(name: str) -> bool:
    return any(part in name for part in ("cls_logits", "cls_score", "bbox_pred"))


class _NoExtraLevels(ExtraFPNBlock):  # type: ignore[misc]
    """Stands in for torchvision's default of pooling one more level, which costs and adds none."""

    def forward(
        self, results: list[Tensor], x: list[Tensor], names: list[str]
    ) -> tuple[list[Tensor], list[str]]:
        return results, names


def _load_from_file(module: nn.Module, preset: Preset, file: Path) -> LoadedWeights:
    try:
        if file.suffix == ".safetensors":
            state: State = load_file(file)
        else:
            # Never a pickle that runs code: weights only.
            state = torch.load(file, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        # PyTorch's own words advise to let the file run code.
        raise ValueError(
            f"{file} cannot be read as weights: it must be safetensors, or a state that PyTorch "
            "saved and that runs no code"
        ) from error
    except (OSError, RuntimeError, SafetensorError, ValueError, EOFError) as error:
        raise ValueError(f"{file} cannot be read as weights: {_first_line(error)}") from error
    if not isinstance(state, Mapping):
        raise ValueError(f"{file} cannot be read as weights: it holds a {type(state).__name__}")
    filled = max(
        (_fill(module, state, prefix, try_only=True), prefix) for prefix in ("", preset.trunk)
    )
    if filled[0] == 0:
        raise ValueError(
            f"{file}: none of its {len(state)} entries fits the preset {preset.name}: set "
            "ML_BACKEND_WEIGHTS to weights of its trunk or of the whole detector"
        )
    _fill(module, state, filled[1])
    return LoadedWeights("file", f"{filled[0]} tensors of {file.name}")


def _fill(module: nn.Module, state: State, prefix: str, *, try_only: bool = False) -> int:
    """Copies the tensors whose name and shape fit; answers how many."""
    own = module.state_dict()
    fitting = {
        prefix + name: tensor
        for name, tensor in state.items()
        if f"{prefix}{name}" in own
        and isinstance(tensor, Tensor)
        and own[prefix + name].shape == tensor.shape
    }
    if not try_only:
        module.load_state_dict(fitting, strict=False)
    return len(fitting)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
