"""Boxes from the third annotation on, with a real Label Studio and a running server."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from ml_backend.demo.label_studio_server import LabelStudioServer
from ml_backend.demo.shapes import SHAPES, generate
from tests.conftest import RunBackend, RunningBackend, wait_for
from tests.test_end_to_end import Site, of_label_studio


def _boxes(site: Site, task: int) -> list[dict[str, Any]]:
    """Opens a task; returns the boxes of its newest prediction by a live head."""
    heads = [p for p in site.open(task) if "-live-" in p["model_version"]]
    newest = max(heads, key=lambda p: int(p["id"]), default=None)
    return newest["result"] if newest is not None else []


def test_third_annotation_draws_boxes_and_each_further_one_is_followed(
    label_studio: LabelStudioServer, run_backend: RunBackend, tmp_path: Path
) -> None:
    images = generate(16, seed=4, shapes=SHAPES[:1], width=320, height=240, most=3)
    site = Site(label_studio, "From the third image on", images)
    tasks = list(site.images)
    backend = run_backend(
        RunningBackend(
            tmp_path,
            **of_label_studio(label_studio),
            ML_BACKEND_PRESET="lite",
            ML_BACKEND_WEIGHTS="auto",
            ML_BACKEND_TRAIN_MIN="100",
        )
    )
    backend.command("connect", "--project", str(site.project), "--url", backend.url)
    site.annotate(tasks[:2])
    time.sleep(2)
    assert not any(_boxes(site, task) for task in tasks[2:])
    site.annotate(tasks[2:3])
    began = time.monotonic()
    # Not on every image is a box worth showing by then.
    boxes = wait_for(
        lambda: [box for task in tasks[4:] for box in _boxes(site, task)],
        within=90,
        what="boxes are drawn",
        every=0.5,
    )
    print(f"first boxes {time.monotonic() - began:.1f} s after the third annotation")
    assert {label for box in boxes for label in box["value"]["rectanglelabels"]} == {"Circle"}

    def versions() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = backend.json("versions", "--project", str(site.project))
        return found

    first = len(versions())
    site.annotate(tasks[3:4])
    wait_for(lambda: len(versions()) > first, within=90, what="the head follows", every=2)
    newest = versions()[0]
    assert newest["card"]["data"]["tasks"] == 4
    assert newest["card"]["kind"] == "live_head"
    # It is a version like any other.
    backend.command("rollback", "--project", str(site.project))
    assert versions()[0]["state"] == "rolled back"
