"""Defines the contract between a family of detector networks and everything that uses one.

To add a family, write a subclass of `Architecture` and name it in a preset. The subclass alone
knows the structure of its networks: names of parameters, heads, image sizes, published weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ml_backend.detection.types import FloatArray


class WeightsError(ValueError):
    """A file of weights cannot be used; the text names it."""


@dataclass(frozen=True, slots=True)
class InputSize:
    """The size at which a network sees images.

    Attributes:
        shortest: the shorter side of an image is scaled to it, in pixels,
        longest: unless the longer side would exceed this.
    """

    shortest: int
    longest: int

    def scale(self, height: float, width: float) -> float:
        """Answers the factor by which an image of this height and width is scaled."""
        return min(self.shortest / min(height, width), self.longest / max(height, width))


@dataclass(frozen=True, slots=True)
class LoadedWeights:
    """The weights that a detector began with.

    Attributes:
        kind: for programs.
        detail: for people.
    """

    kind: Literal["coco", "backbone", "file", "none"]
    detail: str


@dataclass(frozen=True, slots=True)
class Target:
    """The annotated objects of one image of a training batch.

    Attributes:
        boxes: float32 `[N, 4]`, `x1, y1, x2, y2` in pixels of the image.
        labels: int64 `[N]`, index into the label names.
        masks: bool `[N, H, W]`; None where there are none.
    """

    boxes: Tensor
    labels: Tensor
    masks: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """The raw detections of one image, in any order.

    Attributes:
        boxes: `[N, 4]`, `x1, y1, x2, y2` in pixels of the image that was given.
        scores: `[N]`, confidence in `[0, 1]`.
        labels: int64 `[N]`, index into the label names.
        embedding: float32 `[D]`, unit length, of the image; None where the network has none.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    embedding: FloatArray | None = None


@dataclass(frozen=True, slots=True)
class ParameterGroups:
    """The parameters of a network.

    Attributes:
        trunk: those of the feature extractor, pretrained on other images.
        head: all others.
    """

    trunk: list[nn.Parameter]
    head: list[nn.Parameter]


class Architecture(ABC):
    """A family of detector networks.

    An instance holds no network: networks are plain modules, made by `build` or `pretrained` and
    passed to the other methods, so that they can be copied, averaged and saved like any module.
    """

    @property
    def published_labels(self) -> tuple[str, ...] | None:
        """Label names of the published weights of the whole network; None where there are none."""
        return None

    @abstractmethod
    def build(self, labels: int) -> nn.Module:
        """Makes a network for a number of labels, without pretrained weights."""

    @abstractmethod
    def pretrained(self, labels: Sequence[str], weights: str) -> tuple[nn.Module, LoadedWeights]:
        """Makes a network that starts from pretrained weights.

        Args:
            labels: label names. One that the published weights know starts from their rows.
            weights: `none`, `auto` (published weights, downloaded once: of the whole network where
                there are any, or else of its trunk), or a file of a state of either.

        Returns:
            The network, and the weights it began with: `none`, where a download failed.

        Raises:
            WeightsError: the file cannot be read, or nothing in it fits.
        """

    def published(self) -> tuple[nn.Module, LoadedWeights] | None:
        """Makes the network of `published_labels` with its weights; None where it has none."""
        return None

    @abstractmethod
    def losses(
        self, module: nn.Module, images: Sequence[Tensor], targets: Sequence[Target]
    ) -> dict[str, Tensor]:
        """Computes the losses of a batch; their sum is minimised.

        Args:
            module: in training mode.
            images: float32 `[3, H, W]`, RGB in `[0, 1]`, all of one size given by `canvas`.
            targets: the objects of each image.
        """

    @abstractmethod
    def detect(self, module: nn.Module, images: Sequence[Tensor], size: InputSize) -> list[Found]:
        """Finds objects.

        Args:
            module: in evaluation mode.
            images: float32 `[3, H, W]`, RGB in `[0, 1]`, of any sizes.
            size: the size at which the network sees them; resizing is done here.
        """

    @abstractmethod
    def parameter_groups(self, module: nn.Module) -> ParameterGroups:
        """Divides the parameters into trunk and head."""

    @abstractmethod
    def with_labels(self, module: nn.Module, old: Sequence[str], new: Sequence[str]) -> nn.Module:
        """Makes a network for other labels.

        Args:
            module: the network of the `old` labels; it stays as it is.
            old: its label names.
            new: the label names of the result, in any order.

        Returns:
            A network whose rows of the labels in both are those of `module`, wherever they stand
            in either order; rows of labels that are new are freshly initialised, and everything
            that does not belong to a label is copied.
        """

    def canvas(self, height: float, width: float, size: InputSize) -> tuple[int, int]:
        """Chooses the size of training images.

        Args:
            height: median height of the images, in pixels,
            width: and median width.
            size: the size at which the network sees images.

        Returns:
            Height and width in pixels: whole strides of 32, so that nothing is padded.
        """
        scale = size.scale(height, width)
        return max(64, 32 * round(height * scale / 32)), max(64, 32 * round(width * scale / 32))

    def freeze_statistics(self, module: nn.Module) -> None:
        """Keeps the pretrained batch-normalisation statistics in training mode.

        Batches are small: statistics of millions of images are better than theirs.
        """
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.eval()

    def shrink_and_perturb(
        self, module: nn.Module, *, shrink: float = 0.5, noise: float = 0.01
    ) -> None:
        """Prepares a trained network to be trained on (Ash and Adams, 2020).

        Halves the weights of the head and adds noise, which restores the ability to generalise
        that a warm start loses. The trunk stays.
        """
        with torch.no_grad():
            for parameter in self.parameter_groups(module).head:
                if parameter.ndim > 1:
                    scale = parameter.std() if parameter.numel() > 1 else torch.tensor(1.0)
                    parameter.mul_(shrink).add_(torch.randn_like(parameter) * noise * scale)
