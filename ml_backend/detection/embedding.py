"""Makes a short vector of an image from the last features of a detector's trunk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ml_backend.detection.types import FloatArray

DIMENSIONS = 64
"""Length of an embedding: enough to keep distances (Johnson and Lindenstrauss, 1984)."""


class Embeddings:
    """The embeddings of the images of one forward pass.

    Args:
        sizes: height and width in pixels of each image, before the batch was padded.

    Attributes:
        rows: for each image float32 `[DIMENSIONS]`, unit length, once the pass is through; empty
            where there is no trunk.
    """

    def __init__(self, sizes: Sequence[tuple[int, int]]) -> None:
        self.rows: list[FloatArray] = []
        self._sizes = sizes

    def pool(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """Pools each image's own part of the last features: a forward hook of the trunk."""
        features = list(output.values())[-1] if isinstance(output, Mapping) else output
        assert isinstance(features, Tensor)
        height, width = inputs[0].shape[-2:]
        pooled = []
        for row, (own_height, own_width) in zip(features.float(), self._sizes, strict=True):
            down = -(-own_height * row.shape[-2] // height)
            right = -(-own_width * row.shape[-1] // width)
            # Without the padding, which depends on the other images of the batch.
            pooled.append(row[:, :down, :right].mean(dim=(1, 2)))
        self.rows = list(projected(torch.stack(pooled)))


@contextmanager
def embeddings_of(
    trunk: nn.Module | None, sizes: Sequence[tuple[int, int]]
) -> Iterator[Embeddings]:
    """Collects the embeddings of the images that pass a trunk within the block.

    Args:
        trunk: maps the padded batch `[B, 3, H, W]` to features `[B, C, h, w]`, or to a mapping
            whose last value they are; None for no embeddings.
        sizes: height and width in pixels of each image, before the batch was padded.
    """
    seen = Embeddings(sizes)
    hook = trunk.register_forward_hook(seen.pool) if trunk is not None else None
    try:
        yield seen
    finally:
        if hook is not None:
            hook.remove()


def projected(pooled: Tensor) -> FloatArray:
    """Makes embeddings of pooled features.

    Args:
        pooled: float32 `[B, C]`, means over an image's cells.

    Returns:
        float32 `[B, DIMENSIONS]`, unit length.
    """
    rows = pooled.cpu() @ _projection(pooled.shape[1])
    embeddings: FloatArray = nn.functional.normalize(rows, dim=1).numpy()
    return embeddings


def _projection(channels: int) -> Tensor:
    """Draws the same random directions each time."""
    random = torch.Generator().manual_seed(channels)
    directions: Tensor = torch.randn(channels, DIMENSIONS, generator=random) / DIMENSIONS**0.5
    return directions
