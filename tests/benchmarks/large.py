"""Measure the time and the memory that a project takes, over the number of its tasks.

    python -m tests.benchmarks.large --sizes 1000,10000,100000

To compare two commits, run the copy of this file that each commit has, one after the other on the
same machine: the rows have the same names and measure the same work.

Every task has one annotation of ten boxes. They are generated, and served by
`generated_label_studio`, since no real Label Studio can be filled with a million regions in
reasonable time. Measured for each size:

- reading the whole project back into an empty store, and reading back when nothing was missed;
- the start of the server on the full store, its first `/setup` and its first `/webhook`;
- deciding whether a training is due (which the worker does within a second of every change),
  auditing the predictions, `/metrics`, `ml-backend status`;
- building a training set: annotations, images of 17 x 16 pixels, fingerprints, sides;
- the slowest answer to a webhook, of which ten are sent each second, meanwhile.

Memory is the peak of resident memory of the process that does the work, its imports included. A
cost that is quadratic in the number of tasks grows a hundredfold from one size to the next.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from rich.console import Console
from rich.table import Table
from sqlalchemy import select

from ml_backend.backend import Backend
from ml_backend.demo.project import LABEL_CONFIG
from ml_backend.label_studio.label_config import parse_label_config
from ml_backend.projects.reconcile import reconcile
from ml_backend.settings import Settings, load_settings
from ml_backend.store.tables import Project
from ml_backend.training.dataset import build_dataset
from ml_backend.training.sides import write_sides
from tests.benchmarks.generated_label_studio import generated_label_studio, regions, task
from tests.benchmarks.webhooks import send_webhook
from tests.conftest import RunningBackend, capture

KEY = "1.1795463889"
"""The project of the recorded requests, and of the generated ones."""
_PAUSE = 0.1
_err = Console(stderr=True)


def main(
    sizes: Annotated[str, typer.Option(help="Numbers of tasks.")] = "1000,10000,100000",
    as_json: Annotated[bool, typer.Option("--json", help="Answer as JSON.")] = False,
) -> None:
    """Measure projects of several sizes."""
    found = {int(size): _measure(int(size)) for size in sizes.split(",")}
    if as_json:
        print(json.dumps(found, indent=1))
        return
    table = Table("what", *(f"{size:,} tasks" for size in found))
    for what in next(iter(found.values())):
        table.add_row(what, *(f"{one[what]:.3g}" for one in found.values()))
    Console().print(table)


def _measure(size: int) -> dict[str, float]:
    with (
        tempfile.TemporaryDirectory() as name,
        generated_label_studio(size) as label_studio,
    ):
        backend = RunningBackend(
            Path(name),
            LABEL_STUDIO_URL=label_studio,
            LABEL_STUDIO_API_KEY="0" * 40,
            # The worker decides whether a training is due; none ever is.
            ML_BACKEND_TRAIN_MIN="1000000000",
            ML_BACKEND_AUTO_LABEL="false",
        )
        found: dict[str, float] = {}
        backend.start()
        try:
            _setup(backend)
            for what, work in (
                ("reading the project back", _read_back),
                ("reading back, nothing missed", _read_back),
            ):
                found |= _aside(f"{size:,}: {what}", what, work, backend, size)
        finally:
            backend.stop()
        found |= _afresh(backend, size)
        try:
            for what, work in (
                ("is a training due", _look),
                ("counting what became of predictions", _audit),
                ("building the training set", _build),
                ("building it again", _build),
            ):
                found |= _aside(f"{size:,}: {what}", what, work, backend, size)
            found["/metrics: s"] = _seconds(lambda: backend.get("/metrics"))
            found["ml-backend status: s"] = _seconds(lambda: backend.command("status"))
            found |= _peaks(backend)
        finally:
            backend.stop()
    return found


def _afresh(backend: RunningBackend, size: int) -> dict[str, float]:
    """Starts the server on the full store; measures the start and the first requests."""
    _err.print(f"{size:,}: start")
    return {
        "start: s": _seconds(backend.start),
        "first /setup: ms": 1000 * _seconds(lambda: _setup(backend)),
        "first /webhook: ms": 1000 * _hook(backend, 1),
    }


def _peaks(backend: RunningBackend) -> dict[str, float]:
    """Reads the peak memory of the server's process and of the worker's, in MiB."""
    peaks = {"server": 0.0, "worker": 0.0}
    for process in psutil.Process(backend.pid).children(recursive=True):
        name = "worker" if "worker" in process.cmdline() else "server"
        status = Path(f"/proc/{process.pid}/status").read_text()
        kilobytes = next(line.split()[1] for line in status.splitlines() if "VmHWM" in line)
        peaks[name] = max(peaks[name], int(kilobytes) / 1024)
    return {f"{name}: peak MiB": peak for name, peak in peaks.items()}


@dataclass(frozen=True, slots=True)
class _Measured:
    """Holds the seconds and the seconds of a core that some work took, and its peak in MiB."""

    seconds: float
    core: float
    peak: float


def _aside(
    say: str, what: str, work: Callable[[Backend], None], backend: RunningBackend, size: int
) -> dict[str, float]:
    """Does work in a process of its own while webhooks arrive; measures both."""
    _err.print(say)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_do, args=(work, load_settings(backend.settings), theirs))
    with _hooks(backend, size) as taken:
        process.start()
        theirs.close()
        measured: _Measured = ours.recv()
        process.join()
    return {
        f"{what}: s": measured.seconds,
        f"{what}: s of a core": measured.core,
        f"{what}: peak MiB": measured.peak,
        f"{what}: slowest /webhook ms": 1000 * max(taken),
    }


def _do(work: Callable[[Backend], None], settings: Settings, answer: Connection) -> None:
    backend = Backend(settings)
    before = time.process_time()
    seconds = _seconds(lambda: work(backend))
    core = time.process_time() - before
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    answer.send(_Measured(seconds, core, peak))


def _project(backend: Backend) -> Project:
    with backend.database.reading() as session:
        return session.scalars(select(Project)).one()


def _read_back(backend: Backend) -> None:
    project = _project(backend)
    client = backend.label_studios.default()
    assert client is not None
    reconcile(project, client, backend.database, backend.ingest)


def _look(backend: Backend) -> None:
    backend.requests.training(_project(backend).id)


def _audit(backend: Backend) -> None:
    while (wait := backend.audits.update(_project(backend).id)) is not None:
        time.sleep(wait)


def _build(backend: Backend) -> None:
    project = _project(backend)
    with tempfile.TemporaryDirectory() as name:
        build_dataset(
            project,
            parse_label_config(project.label_config),
            backend.database,
            backend.label_studios.images(project),
            Path(name),
            max_pixels=backend.settings.image_max_pixels,
            random_share=backend.settings.random_share,
            store_sides=lambda rows: _store_sides(backend, project.id, rows),
            on_progress=lambda fraction, why: None,
        )


def _store_sides(backend: Backend, project_id: int, rows: list[dict[str, Any]]) -> None:
    """Stores the sides of tasks, as a worker does when a training reports them."""
    with backend.database.session() as session:
        session.get_one(Project, project_id, with_for_update=True)
        write_sides(session, project_id, rows)


def _setup(backend: RunningBackend) -> None:
    body = capture("POST_setup") | {"schema": LABEL_CONFIG, "project": KEY}
    backend.post("/setup", body).raise_for_status()


@contextmanager
def _hooks(backend: RunningBackend, size: int) -> Iterator[list[float]]:
    """Sends webhooks until the block ends; yields the seconds until each acknowledgement."""
    taken: list[float] = []
    done = threading.Event()

    def send() -> None:
        number = 0
        while not done.is_set():
            number += 1
            taken.append(_hook(backend, number % size + 1))
            done.wait(_PAUSE)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield taken
    finally:
        done.set()
        thread.join()


def _hook(backend: RunningBackend, number: int) -> float:
    """Sends the change of an annotation; answers the seconds until it is acknowledged."""
    body: dict[str, Any] = capture("POST_webhook_ANNOTATION_UPDATED")
    moment = f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime())}.{time.time_ns() % 10**9:09d}Z"
    body["project"]["label_config"] = LABEL_CONFIG
    # Of the recorded project; the worker would read back another number at once, beside the
    # reading that is measured.
    body["project"].pop("total_annotations_number", None)
    body["annotation"] |= {
        "id": number,
        "task": number,
        "result": regions(number),
        "updated_at": moment[:26] + "Z",
        "parent_prediction": None,
    }
    body["task"] |= {"id": number, "data": task(number)["data"]}
    return send_webhook(backend, body)


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    typer.run(main)
