"""As much of Label Studio's API as reading a project back needs, over tasks that are generated.

A real Label Studio takes hours to be filled with a million regions. This one answers as the
recorded one does (`GET /api/projects/1/`, `GET /api/tasks` with filters by id and time, in the
order of ids, a page at a time) for a project in which every task has one annotation of ten boxes;
nothing is kept, each task is made anew whenever it is asked for. Only for measuring: whether the
loop understands Label Studio is tested against the real one.
"""

from __future__ import annotations

import base64
import io
import json
import multiprocessing
import random
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
from PIL import Image

from ml_backend.demo.project import LABEL_CONFIG
from ml_backend.demo.shapes import SHAPES

CREATED = "2026-11-23T19:58:09.222146Z"
"""Of the project, as in the recorded webhooks; its tasks changed last at that time as well."""
REGIONS = 10


def task(number: int) -> dict[str, Any]:
    """A task as `GET /api/tasks` shows it: a thumbnail of noise, and ten boxes on it."""
    return {
        "id": number,
        "data": {"image": _image(number)},
        "created_at": CREATED,
        "updated_at": CREATED,
        "total_annotations": 1,
        "cancelled_annotations": 0,
        "annotations": [
            {
                "id": number,
                "result": regions(number),
                "was_cancelled": False,
                "ground_truth": False,
                "lead_time": 31.5,
                "parent_prediction": None,
                "completed_by": 1,
                "created_at": CREATED,
                "updated_at": CREATED,
            }
        ],
        "predictions": [],
    }


def regions(number: int) -> list[dict[str, Any]]:
    """The boxes of a task, as Label Studio's editor writes them."""
    chance = random.Random(number)
    return [
        {
            "id": f"{number:x}-{i}",
            "type": "rectanglelabels",
            "from_name": "label",
            "to_name": "image",
            "origin": "manual",
            "original_width": 17,
            "original_height": 16,
            "image_rotation": 0,
            "value": {
                "x": chance.uniform(0, 80),
                "y": chance.uniform(0, 80),
                "width": chance.uniform(5, 20),
                "height": chance.uniform(5, 20),
                "rotation": 0,
                "rectanglelabels": [SHAPES[chance.randrange(3)]],
            },
        }
        for i in range(REGIONS)
    ]


@contextmanager
def generated_label_studio(tasks: int) -> Iterator[str]:
    """Serves a project of so many tasks from a process of its own; answers the address."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(tasks, theirs), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{ours.recv()}"
    finally:
        process.terminate()
        process.join()


def _image(number: int) -> str:
    # Noise, as large as the perceptual hash looks at it: no two are alike.
    pixels = np.random.default_rng(number).integers(0, 256, (16, 17), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _serve(tasks: int, address: Connection) -> None:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            """Says nothing."""

        def do_GET(self) -> None:
            asked = urlsplit(self.path)
            if asked.path == "/api/projects/1/":
                self._answer(200, _PROJECT)
            elif asked.path == "/api/tasks":
                params = {key: values[0] for key, values in parse_qs(asked.query).items()}
                self._answer(200, _page(tasks, params))
            else:
                self._answer(404, {"detail": "Not found."})

        def _answer(self, status: int, body: object) -> None:
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    address.send(server.server_port)
    server.serve_forever()


_PROJECT = {
    "id": 1,
    "title": "generated",
    "label_config": LABEL_CONFIG,
    "created_at": CREATED,
    "model_version": None,
    "sampling": "Uncertainty sampling",
}


def _page(tasks: int, params: dict[str, str]) -> dict[str, Any]:
    query = json.loads(params["query"])
    filters = {one["filter"].rsplit(":", 1)[1]: one for one in query["filters"]["items"]}
    after = int(filters["id"]["value"]) if "id" in filters else 0
    since = filters["updated_at"]["value"] if "updated_at" in filters else ""
    # All changed at the same time; both are written alike, so that texts compare as times do.
    left = range(after + 1, tasks + 1) if since < CREATED else range(0)
    shown = left[: int(params["page_size"])]
    whole = params.get("fields") == "all"
    return {
        "tasks": [task(n) if whole else {"id": n} for n in shown],
        "total": len(left),
        "total_annotations": len(left),
        "total_predictions": 0,
    }
