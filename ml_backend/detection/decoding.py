"""From an encoded image to pixels, as a browser would show them."""

from __future__ import annotations

import io
import threading
from contextlib import nullcontext
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
"""Formats that are opened; every other decoder of Pillow stays out of reach."""

MAX_PIXELS = 100_000_000
"""Pixels of an image, where nothing else is said."""

_LARGE = 16_000_000
"""Pixels from which on an image is decoded while no other such one is: an image of a few kilobytes
may take a gigabyte on its way to RGB."""
_one_large = threading.Lock()

# Pillow's own guard warns first and counts differently: ours stands in `decode_image`, per call.
Image.MAX_IMAGE_PIXELS = None


class UndecodableImage(ValueError):
    """The bytes are no image that can be used; the text says why."""


def decode_image(source: bytes | Path, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decodes an image: upright (EXIF orientation applied), mode RGB.

    JPEG (CMYK too), PNG (grey, palette, alpha, 16 bit), WebP, BMP, TIFF, and the first frame of a
    GIF. What is transparent becomes white; 16 bits are scaled to 8.

    Args:
        source: the encoded bytes, or the file that holds them.
        max_pixels: an image that says to be larger is refused before it is decoded.

    Raises:
        UndecodableImage: it is none of these, truncated, empty or too large.
    """
    content = source if isinstance(source, bytes) else source.read_bytes()
    if not content:
        raise UndecodableImage("the image is empty (0 bytes)")
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            pixels = image.width * image.height
            if pixels > max_pixels:
                raise UndecodableImage(
                    f"the image has {image.width} x {image.height} pixels, more than the "
                    f"{max_pixels:,} allowed (ML_BACKEND_IMAGE_MAX_PIXELS)"
                )
            with _one_large if pixels > _LARGE else nullcontext():
                image.load()
                return _to_rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError:
        raise UndecodableImage(_not_an_image(content)) from None
    except (OSError, SyntaxError, ValueError, MemoryError, EOFError) as error:
        if isinstance(error, UndecodableImage):
            raise
        raise UndecodableImage(f"the image is damaged: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        return _sixteen_bits(image).convert("RGB")
    if image.mode in {"RGBA", "LA", "PA"} or "transparency" in image.info:
        layered = image.convert("RGBA")
        white = Image.new("RGBA", layered.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layered).convert("RGB")
    return image.convert("RGB")


def _sixteen_bits(image: Image.Image) -> Image.Image:
    """Pillow's own conversion clips at 255; browsers keep the high byte."""
    values = np.asarray(image, np.float64)
    top = values.max(initial=0.0)
    if image.mode == "F" and top <= 1.0:
        values = values * 255.0
    elif top > 255.0:
        values = values / 257.0
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))


def _not_an_image(content: bytes) -> str:
    start = content[:200].lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return (
            "an HTML page came instead of an image: most likely a login page, so the token of "
            "Label Studio is missing or wrong"
        )
    if start.startswith((b"<svg", b"<?xml")):
        return "it is SVG or XML, which is not supported: use PNG or JPEG"
    return f"it is not an image that is supported ({', '.join(FORMATS)})"
