"""A server whose predictions wait for images must answer all other requests."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
import requests
import torch

from ml_backend.backend import Backend
from ml_backend.detection.detector import Detector
from ml_backend.detection.presets import preset_named
from ml_backend.settings import load_settings
from tests.conftest import MakeBackend, RunningBackend, capture, make_live, wait_for

KEY = "1.1795463889"
CONFIG: str = capture("POST_setup")["schema"]
LABELS = ("RBC", "WBC", "Platelets")


class Silent:
    """Accept every connection, and answer none."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._taken: list[socket.socket] = []
        threading.Thread(target=self._take, daemon=True).start()

    @property
    def waiting(self) -> int:
        """The number of connections that wait for an answer."""
        return len(self._taken)

    def close(self) -> None:
        """Close all connections."""
        with suppress(OSError):
            # Closing alone would not end a waiting `accept`.
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in self._taken:
            connection.close()

    def _take(self) -> None:
        while True:
            try:
                self._taken.append(self._listener.accept()[0])
            except OSError:
                return


@pytest.fixture
def silent() -> Iterator[Silent]:
    """Run a host of images that does not answer."""
    host = Silent()
    yield host
    host.close()


def _make_untrained_detector_live(backend: RunningBackend) -> None:
    cpu = torch.device("cpu")
    parts = Backend(load_settings(backend.settings))
    detector = Detector.pretrained(preset_named("tiny", cpu), LABELS, "none", cpu)
    make_live(parts, detector, "v1", key=KEY, label_config=CONFIG)
    parts.database.close()


@pytest.mark.parametrize(("threads", "at_a_time"), [(3, 1), (16, 8)])
def test_server_silent_image_host_keeps_threads_for_other_requests(
    threads: int, at_a_time: int, silent: Silent, make_backend: MakeBackend
) -> None:
    backend = make_backend(
        THREADS=str(threads),
        ML_BACKEND_IMAGE_TIMEOUT="60",
        ML_BACKEND_ALLOWED_IMAGE_HOSTS="127.0.0.1",
        ML_BACKEND_TRAIN_MIN="100",
        ML_BACKEND_AUTO_LABEL="false",
    )
    _make_untrained_detector_live(backend)

    def predict(number: int) -> dict[str, Any]:
        task = {"id": number, "data": {"image": f"{silent.url}/{number}.jpg"}}
        body = {"tasks": [task], "project": KEY, "label_config": CONFIG}
        answer = backend.post("/predict", body)
        answer.raise_for_status()
        found: dict[str, Any] = answer.json()
        return found

    with ThreadPoolExecutor(3 * threads) as pool:
        slow = [pool.submit(predict, number) for number in range(1, 3 * threads + 1)]
        # Some requests wait for their image; the others are answered, and become a job.
        wait_for(lambda: silent.waiting >= at_a_time, within=30, what="images are asked for")
        wait_for(
            lambda: sum(f.done() for f in slow) == len(slow) - at_a_time,
            within=30,
            what="the others are answered",
        )
        assert requests.get(f"{backend.url}/health", timeout=10).ok
        setup = requests.post(f"{backend.url}/setup", json=capture("POST_setup"), timeout=10)
        assert setup.json() == {"model_version": "v1"}
        hook = capture("POST_webhook_ANNOTATION_CREATED")
        stored = requests.post(f"{backend.url}/webhook", json=hook, timeout=10)
        assert stored.json() == {"status": "stored", "changed": 1}
        assert sum(not f.done() for f in slow) == at_a_time
        silent.close()
        assert [f.result()["results"] for f in slow] == [[[]]] * len(slow)
        assert {f.result()["model_version"] for f in slow} == {"v1"}
    metrics = requests.get(f"{backend.url}/metrics", timeout=10).text
    assert f"ml_backend_left_over_tasks_total {len(slow) - at_a_time}.0" in metrics
    # A later request is worked on again: its image is asked for, and cannot be read.
    assert predict(1)["results"] == [[]]
    metrics = requests.get(f"{backend.url}/metrics", timeout=10).text
    assert f"ml_backend_left_over_tasks_total {len(slow) - at_a_time}.0" in metrics
