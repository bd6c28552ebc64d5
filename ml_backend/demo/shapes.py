"""Generate images of shapes on textured backgrounds, some small, some overlapping."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

SHAPES = ("Circle", "Square", "Triangle", "Star")
_SCALE = 2
"""Images are drawn this much larger and shrunk, so that edges are smooth."""


@dataclass(frozen=True, slots=True)
class ShapeImage:
    """Hold a generated image and the shapes on it.

    Attributes:
        name: the name of its file.
        image: the image, RGB.
        boxes: float32 `[N, 4]`, `x1, y1, x2, y2` in pixels.
        labels: the names of the `N` shapes.
    """

    name: str
    image: Image.Image
    boxes: npt.NDArray[np.float32]
    labels: tuple[str, ...]

    def encoded(self) -> bytes:
        """Return the image as JPEG."""
        target = io.BytesIO()
        self.image.save(target, "JPEG", quality=90)
        return target.getvalue()


def generate(
    count: int,
    *,
    seed: int,
    shapes: Sequence[str] = SHAPES[:3],
    width: int = 320,
    height: int = 240,
    most: int = 6,
) -> list[ShapeImage]:
    """Generate images; the same arguments give the same images.

    Args:
        count: number of images.
        seed: of the random numbers.
        shapes: the names to draw from, of `SHAPES`.
        width: width of each image, in pixels.
        height: height of each image, in pixels.
        most: largest number of shapes on an image; one image in twenty has none.
    """
    return [
        _one(np.random.default_rng((seed, i)), f"shapes-{seed}-{i}", shapes, width, height, most)
        for i in range(count)
    ]


def _one(
    random: np.random.Generator,
    name: str,
    shapes: Sequence[str],
    width: int,
    height: int,
    most: int,
) -> ShapeImage:
    large = _background(random, width * _SCALE, height * _SCALE)
    boxes: list[tuple[float, float, float, float]] = []
    labels: list[str] = []
    # An image without shapes is a true negative.
    wanted = 0 if random.random() < 0.05 else int(random.integers(1, most + 1))
    for _ in range(wanted):
        radius = float(random.uniform(9, 36)) * _SCALE
        x = float(random.uniform(radius, width * _SCALE - radius))
        y = float(random.uniform(radius, height * _SCALE - radius))
        if any(_hides((x - radius, y - radius, x + radius, y + radius), box) for box in boxes):
            continue
        shape = str(random.choice(list(shapes)))
        points = _outline(shape, x, y, radius, float(random.uniform(-0.4, 0.4)))
        fill = tuple(int(v) for v in random.integers(0, 256, 3))
        edge = tuple(int(v) for v in random.integers(0, 256, 3))
        ImageDraw.Draw(large).polygon(points, fill=fill, outline=edge, width=2 * _SCALE)
        xs, ys = [p[0] for p in points], [p[1] for p in points]
        boxes.append((min(xs), min(ys), max(xs), max(ys)))
        labels.append(shape)
    image = large.resize((width, height), Image.Resampling.BOX)
    array = (np.array(boxes).reshape(-1, 4) / _SCALE).astype(np.float32)
    return ShapeImage(f"{name}.jpg", image, array, tuple(labels))


def _outline(
    shape: str, x: float, y: float, radius: float, turn: float
) -> list[tuple[float, float]]:
    if shape == "Star":
        spikes = [(radius if i % 2 == 0 else 0.42 * radius) for i in range(10)]
    else:
        spikes = [radius] * {"Circle": 48, "Square": 4, "Triangle": 3}[shape]
    start = turn + (math.pi / 4 if shape == "Square" else -math.pi / 2)
    step = 2 * math.pi / len(spikes)
    return [
        (x + r * math.cos(start + i * step), y + r * math.sin(start + i * step))
        for i, r in enumerate(spikes)
    ]


def _background(random: np.random.Generator, width: int, height: int) -> Image.Image:
    """Return an image of noise at several scales between two colours, like grass, sand or cloth."""
    noise = np.zeros((height, width))
    for cells in (3, 9, 27, 81):
        grid = Image.fromarray((255 * random.random((cells, cells))).astype(np.uint8))
        noise += np.asarray(grid.resize((width, height), Image.Resampling.BICUBIC), float) / cells
    noise = (noise - noise.min()) / max(1e-6, float(np.ptp(noise)))
    low, high = random.integers(30, 226, (2, 3))
    pixels = low + noise[..., None] * (high - low) * 0.6 + random.normal(0, 6, (height, width, 1))
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    return image.filter(ImageFilter.GaussianBlur(1))


def _hides(new: tuple[float, float, float, float], old: tuple[float, float, float, float]) -> bool:
    """Return whether a new box covers more than a third of an old one."""
    across = min(new[2], old[2]) - max(new[0], old[0])
    down = min(new[3], old[3]) - max(new[1], old[1])
    if across <= 0 or down <= 0:
        return False
    return across * down > 0.33 * (old[2] - old[0]) * (old[3] - old[1])
