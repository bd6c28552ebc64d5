"""Reads the size of an image from the head of its file."""

from __future__ import annotations

from pathlib import Path

from PIL import ExifTags, Image

from ml_backend.detection.decoding import FORMATS


def upright_size(file: Path) -> tuple[int, int]:
    """Reads width and height, in pixels, of an image after its EXIF orientation is applied.

    Only the head of the file is read: damage further on is not noticed.

    Raises:
        OSError: the file cannot be read, or is not an image.
        SyntaxError: the head is damaged.
        ValueError: the head is damaged.
    """
    with Image.open(file, formats=FORMATS) as image:
        # Pillow itself turns the size of a TIFF. The getexif of a PNG would decode all of it.
        turned = image.format != "TIFF" and (
            Image.Image.getexif(image).get(ExifTags.Base.Orientation) in {5, 6, 7, 8}
        )
        return (image.height, image.width) if turned else image.size
