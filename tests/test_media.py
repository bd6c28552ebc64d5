"""The media of a task: where a control finds it, and the error where there is none."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import pytest
from PIL import Image

from ml_backend.label_studio.disk_cache import DiskCache
from ml_backend.label_studio.images import ImageSource, ImageUnavailable
from ml_backend.label_studio.label_config import parse_label_config
from ml_backend.label_studio.media import fetch_media, media_of, read_image

CONTROL = parse_label_config(
    '<View><Image name="photo" value="$picture"/><RectangleLabels name="label" toName="photo">'
    '<Label value="car"/></RectangleLabels></View>'
).controls[0]


@pytest.fixture
def images(tmp_path: Path) -> ImageSource:
    return ImageSource(
        None, None, DiskCache(tmp_path, 0), max_bytes=100_000, timeout=5, allowed_hosts=()
    )


def _inline(width: int, height: int) -> str:
    content = io.BytesIO()
    Image.new("RGB", (width, height), "grey").save(content, "PNG")
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"


def test_media_of_gives_the_field_that_the_control_names() -> None:
    data = {"picture": "/data/upload/1/a.png", "image": "another"}
    assert media_of(data, CONTROL) == "/data/upload/1/a.png"


@pytest.mark.parametrize(
    "data", [{}, {"image": "a.png"}, {"picture": ""}, {"picture": None}, {"picture": 7}, None, []]
)
def test_media_of_missing_field_error_names_the_field(data: object, images: ImageSource) -> None:
    words = "^the task's data has no image under 'picture'$"
    with pytest.raises(ImageUnavailable, match=words):
        media_of(data, CONTROL)
    with pytest.raises(ImageUnavailable, match=words):
        fetch_media(images, {"id": 1, "data": data}, CONTROL)


def test_read_image_gives_the_decoded_image(images: ImageSource) -> None:
    task = {"id": 1, "data": {"picture": _inline(40, 20)}}
    assert read_image(images, task, CONTROL, max_pixels=1000).size == (40, 20)


def test_fetch_media_task_without_an_id_reads_an_inline_image(images: ImageSource) -> None:
    assert fetch_media(images, {"data": {"picture": _inline(4, 2)}}, CONTROL)[1:4] == b"PNG"
