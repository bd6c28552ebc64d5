"""Decoding: what a browser shows is what the detector sees, and nothing else gets in."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from ml_backend.detection.decoding import UndecodableImage, decode_image


def _picture() -> Image.Image:
    """No symmetry: a red corner at the top left, a blue one at the bottom right."""
    pixels = np.full((40, 64, 3), 200, np.uint8)
    pixels[:12, :24] = (220, 20, 20)
    pixels[30:, 50:] = (20, 20, 220)
    return Image.fromarray(pixels)


def _encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    target = io.BytesIO()
    image.save(target, kind, **options)
    return target.getvalue()


def _difference(found: Image.Image, wanted: Image.Image) -> float:
    assert found.mode == "RGB"
    assert found.size == wanted.size
    return float(np.abs(np.asarray(found, float) - np.asarray(wanted.convert("RGB"), float)).mean())


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {"quality": 95}),
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
        ("BMP", {}),
        ("TIFF", {}),
        ("MPO", {"quality": 95}),
    ],
)
def test_decode_image_each_format_gives_the_same_pixels(kind: str, options: dict[str, Any]) -> None:
    assert _difference(decode_image(_encoded(_picture(), kind, **options)), _picture()) < 3


def test_decode_image_each_colour_mode_becomes_rgb() -> None:
    picture = _picture()
    grey = picture.convert("L")
    assert _difference(decode_image(_encoded(grey, "PNG")), grey) == 0
    palette = picture.convert("P", palette=Image.Palette.ADAPTIVE)
    assert _difference(decode_image(_encoded(palette, "PNG")), picture) < 3
    assert _difference(decode_image(_encoded(palette, "GIF")), picture) < 3
    black_and_white = grey.point(lambda v: 255 * (v > 128)).convert("1")
    assert _difference(decode_image(_encoded(black_and_white, "PNG")), black_and_white) == 0
    cmyk = picture.convert("CMYK")
    assert _difference(decode_image(_encoded(cmyk, "JPEG", quality=95)), picture) < 6


def test_decode_image_sixteen_bits_are_scaled_not_clipped() -> None:
    grey = np.asarray(_picture().convert("L"))
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    assert _difference(decode_image(_encoded(deep, "PNG")), _picture().convert("L")) < 1


def test_decode_image_transparent_pixels_become_white() -> None:
    layered = _picture().convert("RGBA")
    layered.putalpha(
        Image.fromarray(np.where(np.arange(64) < 32, 255, 0).astype(np.uint8)[None].repeat(40, 0))
    )
    found = np.asarray(decode_image(_encoded(layered, "PNG")))
    assert (found[:, 32:] == 255).all()
    assert tuple(found[2, 2]) == (220, 20, 20)


def test_decode_image_animation_gives_the_first_frame() -> None:
    frames = [_picture(), Image.new("RGB", (64, 40), "black")]
    content = _encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert _difference(decode_image(content), _picture()) < 3


TURNS: dict[int, Callable[[Image.Image], Image.Image]] = {
    1: lambda image: image,
    2: lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    3: lambda image: image.transpose(Image.Transpose.ROTATE_180),
    4: lambda image: image.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
    5: lambda image: image.transpose(Image.Transpose.TRANSPOSE),
    6: lambda image: image.transpose(Image.Transpose.ROTATE_90),
    7: lambda image: image.transpose(Image.Transpose.TRANSVERSE),
    8: lambda image: image.transpose(Image.Transpose.ROTATE_270),
}
"""How a camera stores the picture for each EXIF orientation: the opposite of how it is shown."""


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_decode_image_each_exif_orientation_is_turned_upright(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = TURNS[orientation](_picture())
    content = _encoded(stored, kind, exif=exif, **({"quality": 95} if kind == "JPEG" else {}))
    assert _difference(decode_image(content), _picture()) < 4


def _png_that_says(width: int, height: int) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(b"\0" * 100)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><title>Log in</title>", "login page"),
        (b"  <html><body>", "login page"),
        (b'<?xml version="1.0"?><svg/>', "SVG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not an image that is supported"),
        (b"\0" * 1000, "not an image that is supported"),
        (_png_that_says(60_000, 60_000), "more than the 100,000,000 allowed"),
        (_encoded(_picture(), "JPEG")[:600], "damaged"),
        (_encoded(_picture(), "PNG")[:80], "damaged"),
        (_encoded(_picture(), "ICO"), "not an image that is supported"),
    ],
)
def test_decode_image_no_image_raises_error_with_reason(content: bytes, says: str) -> None:
    with pytest.raises(UndecodableImage, match=says):
        decode_image(content)


def test_decode_image_strip_of_one_pixel_is_decoded() -> None:
    assert decode_image(_encoded(Image.new("RGB", (1, 50_000)), "PNG")).size == (1, 50_000)


_WHOLE = {
    kind: _encoded(_picture(), kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP")
}


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_decode_image_damaged_bytes_are_decoded_or_refused(data: st.DataObject) -> None:
    content = bytearray(_WHOLE[data.draw(st.sampled_from(sorted(_WHOLE)))])
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert decode_image(bytes(content), max_pixels=1_000_000).mode == "RGB"
    except UndecodableImage as error:
        assert str(error)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_decode_image_random_bytes_raise_error(content: bytes) -> None:
    with pytest.raises(UndecodableImage):
        decode_image(content)
