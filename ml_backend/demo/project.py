"""Create a project in Label Studio, upload images and annotate them, through its API."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import requests

from ml_backend.demo.label_studio_server import LabelStudioServer
from ml_backend.demo.shapes import ShapeImage

LABEL_CONFIG = """<View>
  <Image name="image" value="$image"/>
  <RectangleLabels name="label" toName="image">
    <Label value="Circle"/>
    <Label value="Square"/>
    <Label value="Triangle"/>
  </RectangleLabels>
</View>"""
_UPLOADS = 50


def create_project(
    server: LabelStudioServer, title: str, label_config: str, images: Mapping[str, bytes]
) -> tuple[int, dict[str, int]]:
    """Create a project and upload images; return its id, and the task of each image's name."""
    answer = requests.post(
        f"{server.url}/api/projects/",
        headers=_headers(server),
        json={"title": title, "label_config": label_config},
        timeout=60,
    )
    answer.raise_for_status()
    project = int(answer.json()["id"])
    return project, upload(server, project, images)


def upload(server: LabelStudioServer, project: int, images: Mapping[str, bytes]) -> dict[str, int]:
    """Upload JPEG images; return the task of each image's name."""
    names = list(images)
    for start in range(0, len(names), _UPLOADS):
        # Label Studio keeps only the last file of each field name.
        files = {
            f"file{i}": (name, images[name], "image/jpeg")
            for i, name in enumerate(names[start : start + _UPLOADS])
        }
        requests.post(
            f"{server.url}/api/projects/{project}/import",
            headers=_headers(server),
            files=files,
            timeout=300,
        ).raise_for_status()
    tasks = requests.get(
        f"{server.url}/api/tasks",
        headers=_headers(server),
        params={"project": str(project), "page_size": "10000", "review": "true"},
        timeout=300,
    )
    tasks.raise_for_status()
    found: dict[str, int] = {}
    for task in tasks.json()["tasks"]:
        # Eight random digits and a dash stand before the name of an upload.
        name = str(task["data"]["image"]).rsplit("/", 1)[-1].partition("-")[2]
        if name in images:
            found[name] = int(task["id"])
    return found


def annotate(server: LabelStudioServer, tasks: Mapping[int, ShapeImage]) -> None:
    """Annotate tasks with the boxes of their generated images, at 7 s a box."""
    for task, image in tasks.items():
        requests.post(
            f"{server.url}/api/tasks/{task}/annotations/",
            headers=_headers(server),
            json={"result": regions(image), "lead_time": 7.0 * (1 + len(image.labels))},
            timeout=60,
        ).raise_for_status()


def regions(image: ShapeImage) -> list[dict[str, Any]]:
    """Return a generated image's regions as the browser sends them, in percent of the image."""
    width, height = image.image.size
    return [
        {
            "id": f"region{i}",
            "type": "rectanglelabels",
            "from_name": "label",
            "to_name": "image",
            "original_width": width,
            "original_height": height,
            "image_rotation": 0,
            "origin": "manual",
            "value": {
                "x": 100 * float(x1) / width,
                "y": 100 * float(y1) / height,
                "width": 100 * float(x2 - x1) / width,
                "height": 100 * float(y2 - y1) / height,
                "rotation": 0,
                "rectanglelabels": [label],
            },
        }
        for i, ((x1, y1, x2, y2), label) in enumerate(zip(image.boxes, image.labels, strict=True))
    ]


def _headers(server: LabelStudioServer) -> dict[str, str]:
    return {"Authorization": f"Token {server.login.token}"}
