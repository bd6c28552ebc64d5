"""Measure whether the memory, threads, open files or disk of a running backend grow.

    python -m tests.benchmarks.soak --minutes 30

Webhooks, opened tasks (`/health`, `/setup`, `/predict`), `/metrics` and `ml-backend status` come
all the time, from a few annotators at once; every new annotation or correction counts for the next
training, which starts by itself, with a preset that takes a second. Whatever a training makes is
promoted by hand, so that versions are swapped all the time, and every third is rolled back.

Looked at are the server's process and the worker's (not the trainings: each ends with its process):
at the start, after a third of the time, and at the end. Flat means that from the second to the
third look memory grows by at most 5 % or 20 MiB, threads and open files by at most 5, and
`MODEL_DIR` by at most 5 MiB: the annotators correct the same tasks over and over, so that nothing
has a reason to grow but the rows of jobs and of versions.
"""

from __future__ import annotations

import base64
import copy
import itertools
import json
import random
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from rich.console import Console
from rich.table import Table

from ml_backend.demo.project import LABEL_CONFIG, regions
from ml_backend.demo.shapes import generate
from tests.conftest import ROOT, RunningBackend, capture, wait_for

KEY = "1.1795463889"
"""The project of the recorded requests."""
IMAGES = 24
_PAUSE = 0.2
_MEMORY = 20.0
_SHARE = 0.05
_FEW = 5
_DISK = 5.0
_err = Console(stderr=True)


@dataclass(frozen=True, slots=True)
class Look:
    """Holds the resources that the backend uses at a moment.

    Attributes:
        minute: since the start.
        server_mib: resident memory of the server's process.
        server_threads: threads of the server's process.
        server_files: open files of the server's process, sockets among them.
        worker_mib: resident memory of the worker's process.
        worker_threads: threads of the worker's process.
        worker_files: open files of the worker's process, sockets among them.
        disk_mib: size of all files below `MODEL_DIR`.
    """

    minute: float
    server_mib: float
    server_threads: int
    server_files: int
    worker_mib: float
    worker_threads: int
    worker_files: int
    disk_mib: float


def main(
    minutes: Annotated[float, typer.Option(help="How long.")] = 30.0,
    annotators: Annotated[int, typer.Option(help="At once.")] = 4,
    as_json: Annotated[bool, typer.Option("--json", help="Answer as JSON.")] = False,
) -> None:
    """Let it run, and look at it three times."""
    with tempfile.TemporaryDirectory() as name:
        backend = RunningBackend(
            Path(name),
            ML_BACKEND_PRESET="tests.quick:PRESET",
            ML_BACKEND_TRAIN_DELAY="2",
            ML_BACKEND_TRAIN_GROWTH="0",
            PYTHONPATH=str(ROOT),
        )
        backend.start()
        try:
            looks, done = _soak(backend, minutes, annotators)
        finally:
            backend.stop()
    grown = _grown(looks[1], looks[2])
    if as_json:
        found = {"looks": [asdict(look) for look in looks], "done": done, "grown": grown}
        print(json.dumps(found, indent=1))
        return
    table = Table("what", *(f"minute {look.minute:.1f}" for look in looks))
    for field in list(asdict(looks[0]))[1:]:
        table.add_row(field, *(f"{asdict(look)[field]:.4g}" for look in looks))
    out = Console()
    out.print(table)
    out.print(", ".join(f"{count:,} {what}" for what, count in done.items()))
    out.print(f"not flat: {', '.join(grown)}" if grown else "flat")


def _soak(
    backend: RunningBackend, minutes: float, annotators: int
) -> tuple[list[Look], dict[str, int]]:
    began = time.monotonic()
    traffic = _Traffic(backend)
    for number in range(1, IMAGES + 1):
        traffic.annotate(number)
    looks = [_look(backend, began)]
    done = threading.Event()
    work: list[Callable[[], object]] = [lambda: traffic.annotator(done) for _ in range(annotators)]
    work += [lambda: traffic.admin(done), lambda: traffic.promoter(done)]
    with ThreadPoolExecutor(len(work)) as pool:
        running = [pool.submit(one) for one in work]
        try:
            for share in (1 / 3, 1.0):
                until = began + 60 * minutes * share
                while time.monotonic() < until:
                    time.sleep(1)
                    for one in running:
                        if one.done():
                            one.result()
                looks.append(_look(backend, began))
                _err.print(looks[-1])
        finally:
            done.set()
    return looks, traffic.done


class _Traffic:
    """What people do, and how often they did it."""

    def __init__(self, backend: RunningBackend) -> None:
        self._backend = backend
        self._lock = threading.Lock()
        self._pictures = generate(IMAGES, seed=7, width=128, height=96)
        self._images = [
            f"data:image/png;base64,{base64.b64encode(p.encoded()).decode()}"
            for p in self._pictures
        ]
        self.done: dict[str, int] = {}

    def annotate(self, number: int) -> None:
        """A task is annotated, or its annotation corrected."""
        body = copy.deepcopy(capture("POST_webhook_ANNOTATION_UPDATED"))
        result = regions(self._pictures[number - 1])
        moment = datetime.now(UTC).isoformat()
        body["project"]["label_config"] = LABEL_CONFIG
        body["annotation"] |= {
            "id": number,
            "task": number,
            "result": result,
            "updated_at": moment,
            "parent_prediction": None,
        }
        body["task"] |= {"id": number, "data": {"image": self._images[number - 1]}}
        self._post("/webhook", body, "webhooks")

    def annotator(self, done: threading.Event) -> None:
        """Opens a task and corrects it, again and again."""
        chance = random.Random(threading.get_ident())
        while not done.wait(_PAUSE):
            number = chance.randint(1, IMAGES)
            self._backend.get("/health").raise_for_status()
            setup = capture("POST_setup") | {"schema": LABEL_CONFIG}
            self._post("/setup", setup, "setups")
            task = {"id": number, "data": {"image": self._images[number - 1]}}
            body = {"tasks": [task], "project": KEY, "label_config": LABEL_CONFIG, "params": {}}
            self._post("/predict", body, "predictions")
            self.annotate(number)

    def admin(self, done: threading.Event) -> None:
        """Prometheus asks, and somebody looks how far it is."""
        while not done.wait(5):
            self._backend.get("/metrics").raise_for_status()
            self._backend.get("/versions").raise_for_status()
            self._backend.json("status")
            self._count("looks")

    def promoter(self, done: threading.Event) -> None:
        """Makes every new version live, and goes back from every third."""
        seen: set[str] = set()
        for turn in itertools.count(1):
            while not done.wait(2):
                versions = self._backend.json("versions", "-p", "1")
                newest = next((v["version"] for v in versions if v["version"] not in seen), None)
                if newest is not None:
                    break
            else:
                return
            seen |= {v["version"] for v in versions}
            self._count("trainings")
            if versions[0]["state"] != "live":
                self._backend.command("promote", "-p", "1", newest)
            self._count("promotions")
            if turn % 3 == 0:
                self._backend.command("rollback", "-p", "1")
                self._count("rollbacks")

    def _post(self, path: str, body: dict[str, Any], what: str) -> None:
        self._backend.post(path, body).raise_for_status()
        self._count(what)

    def _count(self, what: str) -> None:
        with self._lock:
            self.done[what] = self.done.get(what, 0) + 1


def _look(backend: RunningBackend, began: float) -> Look:
    server, worker = wait_for(lambda: _processes(backend), within=60, what="both processes run")
    files = (path for path in backend.model_dir.rglob("*") if path.is_file())
    return Look(
        minute=(time.monotonic() - began) / 60,
        server_mib=server.memory_info().rss / 2**20,
        server_threads=server.num_threads(),
        server_files=server.num_fds(),
        worker_mib=worker.memory_info().rss / 2**20,
        worker_threads=worker.num_threads(),
        worker_files=worker.num_fds(),
        disk_mib=sum(_size(path) for path in files) / 2**20,
    )


def _processes(backend: RunningBackend) -> tuple[psutil.Process, psutil.Process] | None:
    """Finds the process that serves, and the worker's."""
    children = psutil.Process(backend.pid).children()
    workers = [child for child in children if "worker" in child.cmdline()]
    servers = [
        process for child in children if child not in workers for process in child.children()
    ]
    return (servers[0], workers[0]) if servers and workers else None


def _size(path: Path) -> int:
    # Versions are pruned meanwhile.
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _grown(before: Look, after: Look) -> list[str]:
    """Lists the resources that have grown by more than is allowed."""
    allowed = {
        "server_mib": max(_MEMORY, _SHARE * before.server_mib),
        "worker_mib": max(_MEMORY, _SHARE * before.worker_mib),
        "disk_mib": _DISK,
    }
    first, last = asdict(before), asdict(after)
    return [
        f"{what} from {first[what]:.4g} to {last[what]:.4g}"
        for what in first
        if what != "minute" and last[what] - first[what] > allowed.get(what, _FEW)
    ]


if __name__ == "__main__":
    typer.run(main)
