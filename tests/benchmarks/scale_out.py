"""What further workers bring: trainings an hour, and auto-labelled tasks an hour.

    python -m tests.benchmarks.scale_out

One, two and three workers run, each on a pretended host of its own (`tests.hosts`); they share
PostgreSQL, an S3 server and, for auto-labelling, a real Label Studio (`TEST_LABEL_STUDIO` names its
program). Every process computes with one thread, as if each host had one core.

- Trainings: projects of twelve annotated tasks each, asked for at once. Timed from the request to
  the end of the last training.
- Auto-labelling: one project, split into shards, with a version that no task has a prediction of
  yet. Timed from the request to the end of the job.

All hosts are this machine, and so are PostgreSQL, the S3 server and Label Studio: more workers than
cores bring nothing here. `busy cores` says how many cores were at work on average while the jobs
ran: where it comes near the number of cores, the machine limits; where it does not, the jobs wait,
for Label Studio, for their processes to start, or for the queue, which is looked at twice a second.
"""

from __future__ import annotations

import base64
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import psutil
import torch
import typer
from rich.console import Console
from rich.table import Table

from ml_backend.backend import Backend
from ml_backend.demo.label_studio_server import LabelStudioServer
from ml_backend.demo.project import LABEL_CONFIG, create_project, regions
from ml_backend.demo.shapes import SHAPES, generate
from ml_backend.detection.detector import Detector
from ml_backend.detection.presets import preset_named
from ml_backend.detection.presets.tiny import PRESET as TINY
from ml_backend.label_studio.client import LabelStudioClient
from ml_backend.label_studio.events import (
    AnnotationInfo,
    AnnotationsChanged,
    ProjectInfo,
    TaskInfo,
)
from ml_backend.machine import usable_cores
from ml_backend.store.states import JobKind, JobState, Trigger
from ml_backend.wording import words
from tests.conftest import LOGIN, label_studio_program, make_live, wait_for
from tests.hosts import SERVER, Hosts, all_jobs
from tests.postgresql import PostgreSQL, running_postgresql
from tests.s3_server import S3Server, running_s3

PRESET = replace(TINY, name="scale-out", min_size=160, max_size=240, steps=40, epochs=0)
"""A training of twelve images takes seconds, of which most are computing."""
REFERENCE = "tests.benchmarks.scale_out:PRESET"
"""The value of `ML_BACKEND_PRESET` for it."""
TASKS_OF_TRAINING = 12
LIMIT = 600.0
"""Seconds within which the jobs of one row must end."""
_err = Console(stderr=True)


@dataclass(frozen=True, slots=True)
class Row:
    """The measurements with some number of workers.

    Attributes:
        workers: how many, each on a host of its own.
        trainings_per_hour: trainings that ended.
        training_busy_cores: cores at work on average meanwhile.
        tasks_per_hour: auto-labelled tasks.
        labelling_busy_cores: cores at work on average meanwhile.
    """

    workers: int
    trainings_per_hour: float
    training_busy_cores: float
    tasks_per_hour: float
    labelling_busy_cores: float


@dataclass(frozen=True, slots=True)
class Services:
    """The services that all hosts share.

    Attributes:
        postgresql: holds jobs and queue; emptied for each measurement.
        s3: holds the artefacts.
        label_studio: holds the project that is auto-labelled.
        project: its id.
    """

    postgresql: PostgreSQL
    s3: S3Server
    label_studio: LabelStudioServer
    project: int


def main(
    workers: Annotated[str, typer.Option(help="Numbers of workers.")] = "1,2,3",
    trainings: Annotated[int, typer.Option(help="Trainings for each number.", min=1)] = 6,
    tasks: Annotated[int, typer.Option(help="Tasks to label.", min=1)] = 600,
    shard: Annotated[int, typer.Option(help="Tasks of a shard.", min=1)] = 100,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
) -> None:
    """Measure each number of workers; print a table, on stderr where JSON is asked for."""
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    with _services(tasks) as services:
        rows = [
            _measure(services, count, trainings, tasks, shard)
            for count in map(int, workers.split(","))
        ]
    console = _err if as_json else Console()
    console.print(_table(rows))
    if as_json:
        print(json.dumps({"cores": usable_cores(), "rows": [asdict(row) for row in rows]}))


@contextmanager
def _services(tasks: int) -> Iterator[Services]:
    """Run the services, with a project of so many tasks in Label Studio."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        postgresql = stack.enter_context(running_postgresql())
        s3 = stack.enter_context(running_s3())
        os.environ |= s3.environ()
        label_studio = stack.enter_context(
            LabelStudioServer(label_studio_program(), folder, login=LOGIN)
        )
        _err.print(f"Label Studio runs; {tasks} tasks are uploaded")
        images = {i.name: i.encoded() for i in generate(tasks, seed=5)}
        project, _ = create_project(label_studio, "Scale-out", LABEL_CONFIG, images)
        yield Services(postgresql, s3, label_studio, project)


def _measure(services: Services, workers: int, trainings: int, tasks: int, shard: int) -> Row:
    bucket = services.s3.make_bucket(f"workers-{workers}")
    with _hosts(services, workers, bucket) as hosts:
        seconds, training_cores = _timed(hosts, lambda seen: _ask_trainings(seen, trainings))
        trainings_per_hour = 3600 * trainings / seconds
        _err.print(f"{workers} workers: {trainings_per_hour:.0f} trainings an hour")
    token = services.label_studio.login.token
    with _hosts(
        services,
        workers,
        bucket,
        LABEL_STUDIO_URL=services.label_studio.url,
        LABEL_STUDIO_API_KEY=token,
        ML_BACKEND_AUTO_LABEL_SHARD=str(shard),
    ) as hosts:
        key = LabelStudioClient(services.label_studio.url, token).project(services.project).key
        seconds, labelling_cores = _timed(
            hosts, lambda seen: _ask_labelling(seen, key, f"v{workers}")
        )
        tasks_per_hour = 3600 * tasks / seconds
        _err.print(f"{workers} workers: {tasks_per_hour:,.0f} tasks an hour")
    return Row(workers, trainings_per_hour, training_cores, tasks_per_hour, labelling_cores)


@contextmanager
def _hosts(services: Services, workers: int, bucket: str, **settings: str) -> Iterator[Hosts]:
    """Run so many workers on as many hosts, on an empty database, until all take jobs."""
    services.postgresql.empty()
    with tempfile.TemporaryDirectory() as name:
        hosts = Hosts(
            Path(name),
            DATABASE_URL=services.postgresql.url,
            ML_BACKEND_ARTEFACTS_URL=f"{bucket}/models",
            ML_BACKEND_PRESET=REFERENCE,
            ML_BACKEND_TRAIN_THREADS="1",
            ML_BACKEND_TRAIN_MIN="1000",
            ML_BACKEND_AUTO_LABEL="false",
            **settings,
        )
        try:
            # The first connection makes the tables: the workers find them.
            seen = hosts.backend_of(SERVER)
            assert not all_jobs(seen)
            seen.database.close()
            for number in range(1, workers + 1):
                hosts.start_worker(f"host-{number}")
            hosts.wait_for_workers(workers)
            yield hosts
        finally:
            hosts.stop()


def _timed(hosts: Hosts, ask: Callable[[Backend], Callable[[], bool]]) -> tuple[float, float]:
    """Measure jobs from their request to their end.

    Args:
        hosts: where workers wait for jobs.
        ask: asks for the jobs, and returns the check whether all of them have ended well.

    Returns:
        The seconds, and how many cores were at work on average.
    """
    seen = hosts.backend_of(SERVER)
    ended = ask(seen)
    began = time.monotonic()
    psutil.cpu_percent()
    wait_for(ended, within=LIMIT, what=f"the jobs end: {hosts.tail()}")
    seconds = time.monotonic() - began
    cores = psutil.cpu_percent() / 100 * (psutil.cpu_count() or 1)
    seen.database.close()
    return seconds, cores


def _ask_trainings(seen: Backend, count: int) -> Callable[[], bool]:
    """Ask for a training of each of so many projects; return the check whether all are done."""
    images = generate(TASKS_OF_TRAINING, seed=6)
    moment = datetime.now(UTC)
    projects = []
    for number in range(1, count + 1):
        project = ProjectInfo(f"{number}.1795463889", number, "generated", LABEL_CONFIG, None)
        projects.append(
            seen.ingest.introduce(project.key, number, label_config=LABEL_CONFIG).id,
        )
        for task, image in enumerate(images, 1):
            encoded = base64.b64encode(image.encoded()).decode()
            data = {"image": f"data:image/jpeg;base64,{encoded}"}
            annotation = AnnotationInfo(
                *(task, task, regions(image), False, False, None, None, 1, moment, moment)
            )
            event = AnnotationsChanged(project, (annotation,), (TaskInfo(task, data, moment),))
            seen.ingest.apply(event, project)
    for known in projects:
        seen.requests.training(known, trigger=Trigger.COMMAND, forced=True)
    return lambda: _all_done(seen, JobKind.TRAIN)


def _ask_labelling(seen: Backend, key: str, version: str) -> Callable[[], bool]:
    """Make a version live and ask for its predictions; return the check whether all are there."""
    cpu = torch.device("cpu")
    detector = Detector.pretrained(preset_named(REFERENCE, cpu), SHAPES[:3], "none", cpu)
    detector.thresholds = dict.fromkeys(SHAPES[:3], 0.5)
    make_live(seen, detector, version, key=key, label_config=LABEL_CONFIG)
    project = seen.ingest.introduce(key, int(key.partition(".")[0]), label_config=LABEL_CONFIG)
    seen.requests.autolabel(project.id, trigger=Trigger.COMMAND, forced=True)
    return lambda: _all_done(seen, JobKind.AUTOLABEL)


def _all_done(seen: Backend, kind: JobKind) -> bool:
    """Tell whether all jobs of a kind have ended.

    Raises:
        RuntimeError: one was refused or has failed.
    """
    jobs = [job for job in all_jobs(seen) if job.kind == kind]
    for job in jobs:
        if job.state in {JobState.REFUSED, JobState.FAILED}:
            raise RuntimeError(f"job {job.id} ({kind}) {job.state}: {words(job.reason)}")
    return all(job.state == JobState.DONE for job in jobs)


def _table(rows: list[Row]) -> Table:
    table = Table(
        *("workers", "trainings/h", "to the first", "busy cores"),
        *("tasks/h", "to the first", "busy cores"),
        title=f"{usable_cores()} cores, one thread a process",
    )
    first = rows[0]
    for row in rows:
        table.add_row(
            str(row.workers),
            f"{row.trainings_per_hour:.0f}",
            f"{row.trainings_per_hour / first.trainings_per_hour:.2f}",
            f"{row.training_busy_cores:.1f}",
            f"{row.tasks_per_hour:,.0f}",
            f"{row.tasks_per_hour / first.tasks_per_hour:.2f}",
            f"{row.labelling_busy_cores:.1f}",
        )
    return table


if __name__ == "__main__":
    typer.run(main)
