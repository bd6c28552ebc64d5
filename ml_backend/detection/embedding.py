"""What an image looks like to a detector's own backbone, as a short vector."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ml_backend.detection.types import FloatArray

DIMENSIONS = 64
"""Of an embedding: enough to keep distances (Johnson and Lindenstrauss, 1984) of large trunks."""


class Embeddings:
    """The embeddings of the images of one forward pass.

    Attributes:
        rows: for each image float32 `[DIMENSIONS]`, unit length, once the pass is through; empty
            where the module shows no backbone.
    """

    def __init__(self) -> None:
        self.rows: list[FloatArray] = []
        self._sizes: list[tuple[int, int]] = []
        self._padded: tuple[int, int] = (1, 1)

    def see_images(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """Hook on the detector's transform: how large each image is on the padded canvas."""
        images = output[0]
        self._sizes = list(images.image_sizes)
        self._padded = tuple(images.tensors.shape[-2:])

    def see_features(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """Hook on the trunk: pools each image's own part of the last features."""
        features = list(output.values())[-1] if isinstance(output, Mapping) else output
        assert isinstance(features, Tensor)
        pooled = []
        for row, (height, width) in zip(features.float(), self._sizes, strict=True):
            down = -(-height * row.shape[-2] // self._padded[0])
            right = -(-width * row.shape[-1] // self._padded[1])
            # Without the padding, which depends on the other images of the batch.
            pooled.append(row[:, :down, :right].mean(dim=(1, 2)))
        rows = torch.stack(pooled).cpu() @ _projection(features.shape[1])
        self.rows = list(nn.functional.normalize(rows, dim=1).numpy())


@contextmanager
def embeddings_of(module: nn.Module) -> Iterator[Embeddings]:
    """Watches the forward pass of a detector in torchvision's protocol.

    Args:
        module: with a `transform`, and a `backbone` whose `body`, where it has one, is the trunk,
            as torchvision's detectors have. One without them has no embeddings.
    """
    seen = Embeddings()
    backbone, transform = getattr(module, "backbone", None), getattr(module, "transform", None)
    hooks = []
    if isinstance(backbone, nn.Module) and isinstance(transform, nn.Module):
        hooks.append(transform.register_forward_hook(seen.see_images))
        trunk = getattr(backbone, "body", backbone)
        hooks.append(trunk.register_forward_hook(seen.see_features))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _projection(channels: int) -> Tensor:
    """The same random directions each time."""
    random = torch.Generator().manual_seed(channels)
    directions: Tensor = torch.randn(channels, DIMENSIONS, generator=random) / DIMENSIONS**0.5
    return directions
