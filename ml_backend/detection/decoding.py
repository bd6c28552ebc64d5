"""Decodes images to pixels as a browser would show them."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
"""Formats that are opened; all other decoders of Pillow stay out of reach."""

MAX_PIXELS = 100_000_000
"""Largest number of pixels of an image, by default."""

_LARGE = 16_000_000
"""Pixels from which on one image is decoded at a time: a file of a few kilobytes may take a
gigabyte of memory on its way to RGB."""
_one_large = threading.Lock()

# Pillow's own guard warns first and counts differently: `_open` has a limit for each call.
Image.MAX_IMAGE_PIXELS = None


class Flaw(StrEnum):
    """The kinds of bytes that cannot be used as an image."""

    UNREADABLE = "unreadable"
    TOO_LARGE = "too large"
    WEB_PAGE = "web page"


class UndecodableImage(ValueError):
    """The bytes are no image that can be used; the text says why.

    Attributes:
        flaw: the kind of the flaw.
    """

    def __init__(self, message: str, flaw: Flaw = Flaw.UNREADABLE) -> None:
        super().__init__(message)
        self.flaw = flaw


@dataclass(frozen=True, slots=True)
class ReducedImage:
    """An image that was decoded at a reduced size.

    Attributes:
        image: upright, mode RGB.
        size: width and height of the upright image before it was reduced, in pixels.
    """

    image: Image.Image
    size: tuple[int, int]


def decode_image(source: bytes | Path, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decodes an image: upright (EXIF orientation applied), mode RGB.

    Reads JPEG (CMYK too), PNG (grey, palette, alpha, 16 bit), WebP, BMP, TIFF, and the first frame
    of a GIF. Transparent pixels become white; 16 bits are scaled to 8.

    Args:
        source: the encoded bytes, or the file that holds them.
        max_pixels: an image whose header states more pixels is refused before it is decoded.

    Raises:
        UndecodableImage: the bytes are in none of these formats, truncated, empty, or of more
            pixels than allowed.
    """
    return decode_reduced(source, longest=None, max_pixels=max_pixels).image


def decode_reduced(
    source: bytes | Path, *, longest: int | None, max_pixels: int = MAX_PIXELS
) -> ReducedImage:
    """Decodes an image at a fraction of its size, where it is far larger than needed.

    A JPEG is decoded at 1/2, 1/4 or 1/8 of its size (libjpeg's scaled DCT, Pillow's `draft`), which
    takes a fraction of the time and memory; other formats are reduced after decoding.

    Args:
        source: the encoded bytes, or the file that holds them.
        longest: pixels that the longer side keeps at least, where the image has as many; None for
            no reduction.
        max_pixels: as in `decode_image`.

    Raises:
        UndecodableImage: as `decode_image`.
    """
    with _open(source, max_pixels) as image:
        size = _upright(image)
        if longest is not None:
            share = longest / max(image.size)
            if share < 1:
                # Rounded up: Pillow chooses the smallest size that is not below the one asked for.
                wanted = (max(1, -int(-side * share // 1)) for side in image.size)
                image.draft(None, (next(wanted), next(wanted)))
        with _one_large if image.width * image.height > _LARGE else nullcontext():
            image.load()
            pixels = _to_rgb(ImageOps.exif_transpose(image))
    if longest is not None:
        factor = max(pixels.size) // longest
        pixels = pixels.reduce(factor) if factor > 1 else pixels
    return ReducedImage(pixels, size)


def image_size(source: bytes | Path, *, max_pixels: int | None = MAX_PIXELS) -> tuple[int, int]:
    """Reads width and height, in pixels, of the upright image from its header, without decoding.

    Args:
        source: the encoded bytes, or the file that holds them.
        max_pixels: as in `decode_image`; None for no limit, since no pixel is decoded.

    Raises:
        UndecodableImage: as `decode_image`; damage behind the header is not noticed.
    """
    with _open(source, max_pixels) as image:
        return _upright(image)


@contextmanager
def _open(source: bytes | Path, max_pixels: int | None) -> Iterator[Image.Image]:
    """Opens an image, and turns errors of Pillow within the block into `UndecodableImage`."""
    if (isinstance(source, Path) and source.stat().st_size == 0) or source == b"":
        raise UndecodableImage("the image is empty (0 bytes)")
    try:
        # A file is read as far as needed: of one whose size alone is asked for, the header.
        with Image.open(
            source if isinstance(source, Path) else io.BytesIO(source), formats=FORMATS
        ) as image:
            if max_pixels is not None and image.width * image.height > max_pixels:
                raise UndecodableImage(
                    f"the image has {image.width} x {image.height} pixels, more than the "
                    f"{max_pixels:,} allowed",
                    Flaw.TOO_LARGE,
                )
            yield image
    except UnidentifiedImageError:
        raise _not_an_image(source) from None
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, ValueError, MemoryError, EOFError) as error:
        if isinstance(error, UndecodableImage):
            raise
        raise UndecodableImage(f"the image is damaged: {error}") from error


def _upright(image: Image.Image) -> tuple[int, int]:
    # Pillow turns a TIFF's size by itself. A PNG's own `getexif` would decode all of it.
    turned = image.format != "TIFF" and (
        Image.Image.getexif(image).get(ExifTags.Base.Orientation) in {5, 6, 7, 8}
    )
    return (image.height, image.width) if turned else image.size


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        return _sixteen_bits(image).convert("RGB")
    if image.mode in {"RGBA", "LA", "PA"} or "transparency" in image.info:
        layered = image.convert("RGBA")
        white = Image.new("RGBA", layered.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layered).convert("RGB")
    return image.convert("RGB")


def _sixteen_bits(image: Image.Image) -> Image.Image:
    """Scales 16 bits to 8: Pillow's own conversion clips at 255, browsers keep the high byte."""
    values = np.asarray(image, np.float64)
    top = values.max(initial=0.0)
    if image.mode == "F" and top <= 1.0:
        values = values * 255.0
    elif top > 255.0:
        values = values / 257.0
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))


def _not_an_image(source: bytes | Path) -> UndecodableImage:
    if isinstance(source, Path):
        with source.open("rb") as file:
            start = file.read(200)
    else:
        start = source[:200]
    start = start.lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return UndecodableImage(
            "an HTML page came instead of an image: most likely a login page", Flaw.WEB_PAGE
        )
    if start.startswith((b"<svg", b"<?xml")):
        return UndecodableImage("it is SVG or XML, which is not supported: use PNG or JPEG")
    return UndecodableImage(f"it is not an image that is supported ({', '.join(FORMATS)})")
