"""Measure how fast the server answers, as ratios within one run.

    python -m tests.benchmarks.serve

Starts `ml-backend serve` on a detector trained for a moment on generated shapes, and measures
`/predict` over HTTP against a bare loop over the same model and images, `/webhook` while a
training runs, and `/predict` during the training against idle. Last, a heavy load for ten seconds:
during the training 100 webhooks arrive each second, at even distances, while 16 annotators open
tasks, each the next one a second after the boxes of the last one have arrived. The aim is a 99th
percentile of the webhooks' answers under 250 ms on two cores, and every answer within the 1 s that
Label Studio waits. `--load-only` measures the heavy load alone. To compare two commits, run each
commit's own copy.
"""

from __future__ import annotations

import copy
import functools
import http.client
import http.server
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from ml_backend.backend import Backend
from ml_backend.demo.project import LABEL_CONFIG, regions
from ml_backend.demo.shapes import SHAPES, ShapeImage, generate
from ml_backend.detection.decoding import decode_image
from ml_backend.detection.detector import Detector
from ml_backend.detection.device import describe_device, resolve_device
from ml_backend.detection.presets import preset_named
from ml_backend.detection.training import train
from ml_backend.detection.types import Sample
from ml_backend.settings import load_settings
from tests.benchmarks.webhooks import send_webhook
from tests.conftest import RunningBackend, capture, make_live

KEY = "1.1795463889"
"""The project of the recorded requests."""
LABELS = SHAPES[:3]
_err = Console(stderr=True)


def main(
    preset: Annotated[str, typer.Option(help="As ML_BACKEND_PRESET.")] = "tiny",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    images: Annotated[int, typer.Option(help="Different images.")] = 64,
    seconds: Annotated[float, typer.Option(help="Each measurement takes.")] = 15.0,
    load: Annotated[float, typer.Option(help="Seconds of 100 webhooks and 16 annotators.")] = 10.0,
    load_only: Annotated[bool, typer.Option("--load-only", help="Measure only that.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Answer as JSON.")] = False,
) -> None:
    """Measure the server."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pictures = generate(images, seed=5, width=640, height=480)
        _write(folder / "images", pictures)
        with _files(folder / "images") as address:
            backend, found = _prepare(folder, pictures, preset, device, seconds)
            backend.start()
            try:
                _send(backend, {"tasks": _tasks(address, pictures, range(len(pictures)))})
                hook = _webhook(backend, address, pictures)
                if not load_only:
                    found |= _predicting(backend, address, pictures, seconds, found)
                    found |= _during_a_training(backend, address, pictures, hook, seconds)
                _start_training(backend)
                found |= _under_load(backend, address, pictures, hook, load)
            finally:
                backend.stop()
    if as_json:
        print(json.dumps(found, indent=1))
        return
    table = Table("what", "figure")
    for what, figure in found.items():
        table.add_row(what, figure if isinstance(figure, str) else f"{figure:.3g}")
    Console().print(table)


def _prepare(
    folder: Path,
    pictures: Sequence[ShapeImage],
    preset: str,
    device: str,
    seconds: float,
) -> tuple[RunningBackend, dict[str, Any]]:
    """Makes a backend with a live version, not yet started; measures the bare loop."""
    backend = RunningBackend(
        folder,
        ML_BACKEND_PRESET=preset,
        ML_BACKEND_DEVICE=device,
        ML_BACKEND_TRAIN_EVERY="1000000",
        ML_BACKEND_TRAIN_BUDGET="100000",
        ML_BACKEND_ALLOWED_IMAGE_HOSTS="127.0.0.1",
    )
    _err.print("training a detector for a moment …")
    detector = _publish(backend, folder / "images", pictures)
    _err.print("the bare loop …")
    bare = _bare_loop(detector, folder / "images", pictures, seconds)
    return backend, {
        "device": ", ".join(describe_device(torch.device(detector.device)).values()),
        "cores": os.cpu_count() or 1,
        "bare loop, images/s": bare,
    }


def _predicting(
    backend: RunningBackend,
    address: str,
    pictures: Sequence[ShapeImage],
    seconds: float,
    before: dict[str, Any],
) -> dict[str, Any]:
    bare = before["bare loop, images/s"]
    found: dict[str, Any] = {}
    for clients in (1, 8, 32):
        _err.print(f"{clients} at a time …")
        taken = _load(backend, address, pictures, clients, seconds)
        rate = len(taken) / seconds
        found |= {
            f"/predict, {clients} at a time: images/s": rate,
            f"/predict, {clients} at a time: ratio to the bare loop": rate / bare,
            f"/predict, {clients} at a time: p50 ms": 1000 * float(np.quantile(taken, 0.5)),
            f"/predict, {clients} at a time: p95 ms": 1000 * float(np.quantile(taken, 0.95)),
        }
    _err.print("one selection of 256 tasks …")
    began = time.perf_counter()
    _send(backend, {"tasks": _tasks(address, pictures, range(256))})
    rate = 256 / (time.perf_counter() - began)
    found["/predict, 256 tasks in one: ratio to the bare loop"] = rate / bare
    return found


def _start_training(backend: RunningBackend) -> None:
    """Starts a training, unless one runs, and waits until it learns."""
    if _training_learns(backend):
        return
    _err.print("starting a training …")
    backend.post("/train", {"project": KEY}).raise_for_status()
    while not _training_learns(backend):
        time.sleep(0.5)


def _during_a_training(
    backend: RunningBackend,
    address: str,
    pictures: Sequence[ShapeImage],
    hook: Callable[[], float],
    seconds: float,
) -> dict[str, Any]:
    idle_hooks = _hooks(hook, seconds)
    idle = _one_at_a_time(backend, address, pictures, seconds)
    _start_training(backend)
    _err.print("during the training …")
    hooks = _hooks(hook, seconds)
    with ThreadPoolExecutor(16) as pool:
        burst = list(pool.map(lambda _: hook(), range(500)))
    busy = _one_at_a_time(backend, address, pictures, seconds)
    return {
        "/webhook p99 ms, idle": 1000 * float(np.quantile(idle_hooks, 0.99)),
        "/webhook p99 ms, during a training": 1000 * float(np.quantile(hooks, 0.99)),
        "/webhook p99 ms, during a training, 16 at a time": 1000 * float(np.quantile(burst, 0.99)),
        "/webhook slowest ms, during a training": 1000 * max(*hooks, *burst),
        "/predict p95 ms, idle": 1000 * float(np.quantile(idle, 0.95)),
        "/predict p95 ms, during a training": 1000 * float(np.quantile(busy, 0.95)),
        "/predict p95, during a training: ratio to idle": float(
            np.quantile(busy, 0.95) / np.quantile(idle, 0.95)
        ),
    }


def _under_load(
    backend: RunningBackend,
    address: str,
    pictures: Sequence[ShapeImage],
    hook: Callable[[], float],
    seconds: float,
) -> dict[str, Any]:
    """100 webhooks a second, on time whatever the others take, while 16 annotators open tasks."""
    _err.print("webhooks and annotators during the training …")
    done = threading.Event()

    def annotator(number: int) -> list[float]:
        body = {"tasks": _tasks(address, pictures, [number])}

        def open_task() -> None:
            backend.get("/health").raise_for_status()
            setup = capture("POST_setup") | {"schema": LABEL_CONFIG}
            backend.post("/setup", setup).raise_for_status()
            _send(backend, body)

        opened = []
        while not done.wait(1):
            opened.append(_timed(open_task))
        return opened

    with ThreadPoolExecutor(16) as people, ThreadPoolExecutor(64) as senders:
        annotators = [people.submit(annotator, number) for number in range(16)]
        time.sleep(2)
        began = time.perf_counter()
        sent = []
        for number in range(round(100 * seconds)):
            time.sleep(max(0.0, began + number / 100 - time.perf_counter()))
            sent.append(senders.submit(hook))
        hooks = [one.result() for one in sent]
        rate = len(hooks) / (time.perf_counter() - began)
        done.set()
        opened = [t for one in annotators for t in one.result()]
    if not _training_learns(backend):
        raise RuntimeError("the training did not last: use more images")
    what = "/webhook, 100/s, 16 annotators, during a training"
    return {
        f"{what}: acknowledged/s": rate,
        f"{what}: p50 ms": 1000 * float(np.quantile(hooks, 0.5)),
        f"{what}: p99 ms": 1000 * float(np.quantile(hooks, 0.99)),
        f"{what}: slowest ms": 1000 * max(hooks),
        "opening a task meanwhile: p50 ms": 1000 * float(np.quantile(opened, 0.5)),
        "opening a task meanwhile: p95 ms": 1000 * float(np.quantile(opened, 0.95)),
    }


def _training_learns(backend: RunningBackend) -> bool:
    (project,) = backend.json("status")
    trainings = [job for job in project["jobs"] if job["kind"] == "train"]
    if any(job["state"] in {"failed", "refused"} for job in trainings):
        raise RuntimeError(f"a training ended: {trainings}\n{backend.tail()}")
    return any(job["state"] == "running" and "training" in job["reason"] for job in trainings)


def _write(folder: Path, pictures: Sequence[ShapeImage]) -> None:
    folder.mkdir()
    for picture in pictures:
        (folder / picture.name).write_bytes(picture.encoded())


@contextmanager
def _files(folder: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            """Says nothing."""

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def _publish(backend: RunningBackend, folder: Path, pictures: Sequence[ShapeImage]) -> Detector:
    """Trains for a moment and makes the result the live version of the recorded project."""
    settings = load_settings(backend.settings)
    device = resolve_device(settings.device)
    samples = [
        Sample(
            p.name,
            folder / p.name,
            p.boxes,
            np.array([LABELS.index(x) for x in p.labels], np.int64),
        )
        for p in pictures
    ]
    detector = train(
        preset_named(settings.preset, device),
        LABELS,
        samples,
        weights="none",
        device=device,
        budget_seconds=30,
        threads=os.cpu_count(),
    ).detector
    detector.thresholds = dict.fromkeys(LABELS, 0.3)
    parts = Backend(settings)
    make_live(parts, detector, "v1", key=KEY, label_config=LABEL_CONFIG)
    parts.database.close()
    return detector


def _bare_loop(
    detector: Detector, folder: Path, pictures: Sequence[ShapeImage], seconds: float
) -> float:
    """Images a second of what any script would do: read, decode, predict, batch by batch."""
    size = detector.preset.predict_batch
    contents = [(folder / picture.name).read_bytes() for picture in pictures]

    def batch(start: int) -> None:
        chosen = [contents[(start + i) % len(contents)] for i in range(size)]
        detector.predict([decode_image(content) for content in chosen])

    batch(0)
    began = time.perf_counter()
    count = 0
    while time.perf_counter() - began < seconds:
        batch(count)
        count += size
    return count / (time.perf_counter() - began)


def _tasks(
    address: str, pictures: Sequence[ShapeImage], numbers: Sequence[int]
) -> list[dict[str, Any]]:
    return [
        {"id": n + 1, "data": {"image": f"{address}/{pictures[n % len(pictures)].name}"}}
        for n in numbers
    ]


def _send(backend: RunningBackend, body: dict[str, Any]) -> None:
    whole = {**body, "project": KEY, "label_config": LABEL_CONFIG, "params": {}}
    answer = backend.post("/predict", whole)
    answer.raise_for_status()
    if not all(answer.json()["results"]):
        raise RuntimeError(f"a task was not predicted\n{backend.tail()}")


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _hooks(hook: Callable[[], float], seconds: float) -> list[float]:
    until = time.perf_counter() + seconds
    taken = []
    while time.perf_counter() < until:
        taken.append(hook())
        time.sleep(0.02)
    return taken


def _repeat(work: Callable[[], object], seconds: float, pause: float = 0.0) -> list[float]:
    until = time.perf_counter() + seconds
    taken = []
    while time.perf_counter() < until:
        taken.append(_timed(work))
        time.sleep(pause)
    return taken


def _load(
    backend: RunningBackend,
    address: str,
    pictures: Sequence[ShapeImage],
    clients: int,
    seconds: float,
) -> list[float]:
    """Each client asks for one task after the other, as annotators do who never pause."""

    def client(number: int) -> list[float]:
        body = {"tasks": _tasks(address, pictures, [number])}
        return _repeat(lambda: _send(backend, body), seconds)

    with ThreadPoolExecutor(clients) as pool:
        return [t for taken in pool.map(client, range(clients)) for t in taken]


def _one_at_a_time(
    backend: RunningBackend, address: str, pictures: Sequence[ShapeImage], seconds: float
) -> list[float]:
    body = {"tasks": _tasks(address, pictures, [0])}
    # An annotator looks at an image for a while before opening the next.
    return _repeat(lambda: _send(backend, body), 2 * seconds, pause=0.2)


def _webhook(
    backend: RunningBackend, address: str, pictures: Sequence[ShapeImage]
) -> Callable[[], float]:
    """Sends one new annotation each time it is called; before, one for each picture.

    It answers how many seconds the acknowledgement took, without what making the body takes; each
    goes over a connection of its own, as Label Studio sends them.
    """
    template = capture("POST_webhook_ANNOTATION_CREATED")
    template["project"]["label_config"] = LABEL_CONFIG
    lock = threading.Lock()
    number = 0

    def send() -> float:
        nonlocal number
        with lock:
            number += 1
            own = number
        picture = pictures[own % len(pictures)]
        body = copy.deepcopy(template)
        body["annotation"] |= {"id": own, "task": own, "result": regions(picture)}
        body["task"] |= {"id": own, "data": {"image": f"{address}/{picture.name}"}}
        return send_webhook(backend, body)

    for _ in pictures:
        send()
    return send


if __name__ == "__main__":
    typer.run(main)
