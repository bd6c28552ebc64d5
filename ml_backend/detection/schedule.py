"""Sets the learning rates of a training, and averages its weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ml_backend.detection.presets import Preset

WARM_UP = 0.08
"""Share of the steps in which the learning rate rises."""
TRUNK_RATE = 0.5
"""Learning rate of a pretrained trunk, relative to the head's."""
SCRATCH_RATE = 2.0
"""Learning rate where nothing is pretrained, relative to the preset's."""
MEMORY = 0.99
"""Decay of the average of the weights, per step."""
STEPS_PER_IMAGE = 10
"""Steps for each image beyond the preset's `few_steps`, up to its `steps`."""


def steps_for(preset: Preset, images: int, *, pretrained: bool) -> int:
    """Counts the steps of a training.

    Args:
        preset: its steps, epochs and batch size.
        images: number of training images.
        pretrained: whether the detector starts from pretrained weights: few images then need few
            steps.
    """
    few = preset.few_steps + STEPS_PER_IMAGE * images if pretrained else preset.steps
    return max(min(preset.steps, few), math.ceil(preset.epochs * images / preset.batch_size))


class Schedule:
    """Scales the learning rates of an optimizer over a training.

    Linear warm-up, then half a cosine down to a hundredth.

    Args:
        optimizer: its learning rates when the schedule is made are the peaks.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._peaks = [group["lr"] for group in optimizer.param_groups]

    def set(self, fraction: float) -> None:
        """Sets the learning rates for a fraction of the training, in `[0, 1]`."""
        rate = _rate(min(fraction, 1.0))
        for group, peak in zip(self._optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * rate


def adam(module: nn.Module, preset: Preset, *, pretrained: bool) -> torch.optim.Optimizer:
    """Makes AdamW with a lower learning rate for a pretrained trunk."""
    groups = preset.architecture.parameter_groups(module)
    rate = preset.learning_rate * (1.0 if pretrained else SCRATCH_RATE)
    return torch.optim.AdamW(
        [
            {"params": groups.head, "lr": rate},
            {"params": groups.trunk, "lr": rate * (TRUNK_RATE if pretrained else 1.0)},
        ],
        lr=rate,
        weight_decay=0.02,
    )


def moving_average(mean: Tensor, new: Tensor, count: Tensor | int) -> Tensor:
    """Updates an exponential moving average of weights.

    A young average forgets faster: otherwise the initial weights would weigh on it for long.

    Args:
        mean: the average so far.
        new: the new weights.
        count: number of values averaged so far.
    """
    decay = min(MEMORY, (1 + int(count)) / (10 + int(count)))
    return mean + (new - mean) * (1 - decay)


def _rate(fraction: float) -> float:
    if fraction < WARM_UP:
        return max(0.01, fraction / WARM_UP)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (fraction - WARM_UP) / (1 - WARM_UP)))
