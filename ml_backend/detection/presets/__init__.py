"""Presets: small declarations of a detector and its training recipe, one file each.

To add one, write a file like `tiny.py` and name it in `PRESETS` of `ml_backend.extensions`; from
another package, declare an entry point in the group `ml_backend.presets`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

import torch

from ml_backend.detection.architectures.base import Architecture, InputSize
from ml_backend.extensions import PRESETS, ExtensionError, load_path

_NAME = re.compile(r"[\w.:+-]{1,64}")


class PresetError(ValueError):
    """There is no such preset, or it cannot be used; the text names it."""


@dataclass(frozen=True, slots=True)
class Preset:
    """How to build, feed and train a detector.

    Attributes:
        name: short; part of version names.
        architecture: the family of networks.
        min_size: the shorter side of an image is scaled to it, in pixels,
        max_size: unless the longer side would exceed this.
        learning_rate: peak of the schedule, for AdamW; the pretrained trunk learns at half of it.
        batch_size: images in a training step.
        predict_batch: images predicted together at most.
        steps: training steps,
        epochs: or passes over the images, whichever is more.
        few_steps: steps in which a pretrained detector learns the first images; each image adds
            some, up to `steps`.
        source: name or import path that it was loaded by; `preset_named` fills it in.
    """

    name: str
    architecture: Architecture
    min_size: int
    max_size: int
    learning_rate: float
    batch_size: int
    predict_batch: int
    steps: int
    epochs: int
    few_steps: int = 200
    source: str = field(default="", compare=False)

    @property
    def reference(self) -> str:
        """The text that `preset_named` finds the preset by again."""
        return self.source or self.name

    @property
    def input_size(self) -> InputSize:
        """The size at which the network sees images."""
        return InputSize(self.min_size, self.max_size)

    @property
    def longest_side(self) -> int:
        """Pixels of an image's longer side that are worth decoding: twice what the network sees.

        The rest serves augmentation, which zooms in.
        """
        return 2 * self.max_size


def preset_named(name: str, device: torch.device) -> Preset:
    """Finds the preset of a setting.

    Args:
        name: `auto` (accurate on a GPU, lite on a CPU), a registered name, or the import path of a
            `Preset`, `package.module:attribute`.
        device: where it will run.

    Raises:
        PresetError: there is no such preset; the text names those there are.
    """
    if name == "auto":
        name = "accurate" if device.type == "cuda" else "lite"
    try:
        if name in PRESETS:
            preset = PRESETS.load(name)
        elif ":" in name:
            preset = load_path("preset", name)
        else:
            raise PresetError(
                f"there is no preset {name!r}: it must be auto, {', '.join(PRESETS)}, or an import "
                "path, package.module:attribute"
            )
    except ExtensionError as error:
        raise PresetError(str(error)) from error
    if not isinstance(preset, Preset):
        raise PresetError(f"{name!r} is not a Preset (ml_backend.detection.presets.Preset)")
    return replace(preset, source=name)


def check(preset: str, weights: str, device: torch.device) -> None:
    """Makes sure that trainings can begin: builds the preset, and fits a file of weights.

    Args:
        preset: as in `preset_named`.
        weights: `auto`, `none` or a file; nothing is downloaded.
        device: where trainings run; it decides what `auto` is, all is built on the CPU.

    Raises:
        PresetError: there is no such preset, or it cannot be built.
        WeightsError: the file of weights does not fit.
    """
    chosen = preset_named(preset, device)
    if not _NAME.fullmatch(chosen.name):
        raise PresetError(f"the name {chosen.name!r} of {preset} cannot be part of a file name")
    try:
        chosen.architecture.build(1)
    except Exception as error:
        # Another package's module may raise anything.
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PresetError(f"{preset} cannot be built: {cause}") from error
    if weights not in {"auto", "none"}:
        chosen.architecture.pretrained(("object",), weights)
