"""Reads the media of a task that a control marks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from PIL.Image import Image

from ml_backend.detection.decoding import decode_image
from ml_backend.label_studio.controls.base import Control
from ml_backend.label_studio.images import ImageSource, ImageUnavailable


def media_of(data: object, control: Control) -> str:
    """Finds the address of a task's media for a control.

    Args:
        data: the task's `data`.
        control: the control; its `data_key` names the field.

    Returns:
        The address as the task holds it, or the media itself as a `data:` address.

    Raises:
        ImageUnavailable: the field is missing, empty, or not a text.
    """
    value = data.get(control.data_key) if isinstance(data, Mapping) else None
    if not isinstance(value, str) or not value:
        kind = control.media_tag.lower()
        raise ImageUnavailable(f"the task's data has no {kind} under {control.data_key!r}")
    return value


def fetch_media(images: ImageSource, task: Mapping[str, Any], control: Control) -> bytes:
    """Fetches a task's media for a control, still encoded.

    Args:
        images: reads it.
        task: a task as Label Studio sends it, with `id` and `data`.
        control: the control.

    Raises:
        ImageUnavailable: the task has none, or it cannot be read.
    """
    number = task.get("id")
    value = media_of(task.get("data"), control)
    return images.fetch(number if isinstance(number, int) else None, value)


def read_image(
    images: ImageSource, task: Mapping[str, Any], control: Control, *, max_pixels: int
) -> Image:
    """Fetches and decodes a task's image for a control.

    Args:
        images: reads it.
        task: a task as Label Studio sends it, with `id` and `data`.
        control: the control.
        max_pixels: a larger image is refused.

    Returns:
        The upright image (EXIF orientation applied), in the mode RGB.

    Raises:
        ImageUnavailable: the task has none, or it cannot be read.
        UndecodableImage: it cannot be decoded.
    """
    return decode_image(fetch_media(images, task, control), max_pixels=max_pixels)
