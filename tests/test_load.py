"""Send a server far more at once than it ever gets: it must store everything."""

from __future__ import annotations

import base64
import copy
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import requests
import torch
from sqlalchemy import select

from ml_backend.backend import Backend
from ml_backend.demo.shapes import ShapeImage, generate
from ml_backend.detection.detector import Detector
from ml_backend.detection.presets import preset_named
from ml_backend.projects.counts import annotated_tasks
from ml_backend.settings import load_settings
from ml_backend.store.tables import Job, Project
from tests.conftest import MakeBackend, capture, make_live, wait_for

KEY = "1.1795463889"
CONFIG: str = capture("POST_setup")["schema"]
LABELS = ("RBC", "WBC", "Platelets")
LEARNED = 8
HOOKS = 1000
SECONDS = 10.0
ANNOTATORS = 16


def _image(picture: ShapeImage) -> str:
    return f"data:image/png;base64,{base64.b64encode(picture.encoded()).decode()}"


def test_server_thousand_webhooks_during_a_training_stores_all(
    make_backend: MakeBackend,
) -> None:
    backend = make_backend(
        ML_BACKEND_TRAIN_MIN="100000",
        ML_BACKEND_TRAIN_BUDGET="600",
        ML_BACKEND_AUTO_LABEL="false",
    )
    parts = Backend(load_settings(backend.settings))
    cpu = torch.device("cpu")
    detector = Detector.pretrained(preset_named("tiny", cpu), LABELS, "none", cpu)
    make_live(parts, detector, "v1", key=KEY, label_config=CONFIG)
    pictures = [_image(picture) for picture in generate(LEARNED, seed=31, width=128, height=96)]
    template = capture("POST_webhook_ANNOTATION_CREATED")

    def annotate(number: int) -> tuple[int, Any]:
        body = copy.deepcopy(template)
        body["annotation"] |= {"id": number, "task": number}
        body["task"] |= {"id": number, "data": {"image": pictures[number % LEARNED]}}
        answer = backend.post("/webhook", body)
        return answer.status_code, answer.json()

    def training() -> Job:
        with parts.database.reading() as session:
            return session.scalars(select(Job).where(Job.kind == "train")).one()

    for number in range(1, LEARNED + 1):
        annotate(number)
    assert backend.post("/webhook", capture("POST_webhook_START_TRAINING")).ok
    wait_for(lambda: training().progress > 0.1, within=120, what="a training learns")

    done = threading.Event()

    def open_tasks(number: int) -> list[tuple[int, int, str]]:
        """Open one task after the other; return status, number of results and version of each."""
        task = {"id": number, "data": {"image": pictures[number % LEARNED]}}
        body = {"tasks": [task], "project": KEY, "label_config": CONFIG, "params": {}}
        opened = []
        while not done.is_set():
            assert backend.get("/health").ok
            version = backend.post("/setup", capture("POST_setup")).json()["model_version"]
            answer = backend.post("/predict", body)
            results = answer.json()["results"]
            opened.append((answer.status_code, len(results), version))
            assert results[0]["model_version"] == version
            done.wait(1)
        return opened

    with ThreadPoolExecutor(ANNOTATORS) as people, ThreadPoolExecutor(64) as senders:
        opening = [people.submit(open_tasks, number) for number in range(ANNOTATORS)]
        began = time.monotonic()
        sent = []
        for number in range(1, HOOKS + 1):
            time.sleep(max(0.0, began + number * SECONDS / HOOKS - time.monotonic()))
            sent.append(senders.submit(annotate, LEARNED + number))
        answers = [one.result() for one in sent]
        done.set()
        opened = [one for annotator in opening for one in annotator.result()]
    assert answers == [(200, {"status": "stored", "changed": 1})] * HOOKS
    assert set(opened) == {(200, 1, "v1")}
    assert len(opened) >= ANNOTATORS
    # The training ran all the while.
    assert (training().state, training().attempt) == ("running", 1)
    with parts.database.reading() as session:
        project = session.scalars(select(Project)).one()
        assert annotated_tasks(session, project.id) == LEARNED + HOOKS
    assert project.revision == LEARNED + HOOKS
    assert requests.get(f"{backend.url}/health", timeout=10).ok
    parts.database.close()
