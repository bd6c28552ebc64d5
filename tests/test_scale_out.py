"""Several workers on several hosts, which share PostgreSQL and an S3 server, and no files."""

from __future__ import annotations

import base64
import copy
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import s3fs
from sqlalchemy import update

from ml_backend.backend import Backend
from ml_backend.demo.label_studio_server import LabelStudioServer
from ml_backend.demo.project import LABEL_CONFIG, annotate, create_project
from ml_backend.demo.shapes import ShapeImage, generate
from ml_backend.jobs.jobs import STALE_AFTER
from ml_backend.label_studio.client import LabelStudioClient
from ml_backend.store.states import JobKind, JobState, Trigger
from ml_backend.store.tables import Job, Project, now
from tests.conftest import RunningBackend, capture, predictions_held, wait_for
from tests.hosts import SERVER, Hosts, Worker, all_jobs, job_processes
from tests.postgresql import PostgreSQL
from tests.s3_server import S3Server, running_s3

pytestmark = [pytest.mark.server, pytest.mark.slow]

LONG = 300.0
"""Seconds that guard against hanging: processes of jobs get little of a busy machine."""


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    """Run an S3 server for all tests of this file; each has a bucket of its own."""
    with running_s3() as server:
        yield server


@pytest.fixture
def hosts(
    postgresql: PostgreSQL, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Hosts]]:
    """Return a function that prepares hosts with given settings; all end with the test."""
    postgresql.empty()
    for name, value in s3.environ().items():
        monkeypatch.setenv(name, value)
    bucket = s3.make_bucket(tmp_path.name.replace("_", "-"))
    made: list[Hosts] = []

    def make(**settings: str) -> Hosts:
        made.append(
            Hosts(
                tmp_path,
                DATABASE_URL=postgresql.url,
                ML_BACKEND_ARTEFACTS_URL=f"{bucket}/models",
                ML_BACKEND_PRESET="tests.quick:PRESET",
                ML_BACKEND_TRAIN_MIN="100",
                ML_BACKEND_AUTO_LABEL="false",
                TEST_HOLD=str(_hold(tmp_path)),
                **settings,
            )
        )
        return made[-1]

    yield make
    # Processes that wait for the file's end do not hear of SIGTERM.
    _hold(tmp_path).unlink(missing_ok=True)
    for running in made:
        running.stop()
    # fsspec keeps connections, which belong to this environment.
    s3fs.S3FileSystem.clear_instance_cache()


def _hold(folder: Path) -> Path:
    """Return the file that makes detectors wait in their making; see `tests.quick`."""
    return folder / "hold"


def _data(image: ShapeImage) -> dict[str, str]:
    return {"image": f"data:image/png;base64,{base64.b64encode(image.encoded()).decode()}"}


def _annotate(backend: RunningBackend, project: int, number: int, image: ShapeImage) -> None:
    body = copy.deepcopy(capture("POST_webhook_ANNOTATION_CREATED"))
    body["project"]["id"] = project
    body["annotation"] |= {"id": number, "task": number}
    body["task"] |= {"id": number, "data": _data(image)}
    assert backend.post("/webhook", body).ok


def _running_on(seen: Backend, kind: JobKind) -> dict[str | None, int]:
    """Return the running job of each host."""
    return {
        job.host: job.id
        for job in all_jobs(seen)
        if job.kind == kind and job.state == JobState.RUNNING
    }


def _busy(workers: list[Worker]) -> tuple[Worker, Worker]:
    """Return the worker of a host that has a job, and the one that stands by."""
    wait_for(lambda: any(map(job_processes, workers)), within=LONG, what="a job's process runs")
    (busy,) = [worker for worker in workers if job_processes(worker)]
    (idle,) = [worker for worker in workers if worker is not busy]
    return busy, idle


def _kill(worker: Worker) -> None:
    """Kill a worker, and wait until its job's process has ended with it."""
    processes = job_processes(worker)
    worker.kill()
    worker.wait(10)
    wait_for(
        lambda: not any(process.is_running() for process in processes),
        within=LONG,
        what="the job's process ends with its worker",
    )


def _silence(seen: Backend, job: int) -> None:
    """Let the last heartbeat of a job, whose worker is dead, lie as far back as that counts."""
    with seen.database.session() as session:
        past = now() - STALE_AFTER - timedelta(seconds=1)
        session.execute(update(Job).where(Job.id == job).values(heartbeat_at=past))


def test_trainings_workers_killed_are_done_by_others_and_their_versions_serve(
    hosts: Callable[..., Hosts], tmp_path: Path
) -> None:
    running = hosts()
    on_a = [running.start_worker("a"), running.start_worker("a")]
    on_b = running.start_worker("b")
    running.start()
    running.wait_for_workers(2, standing_by=1)
    _hold(tmp_path).touch()
    seen = running.backend_of(SERVER)
    images = generate(6, seed=31, width=96, height=72)
    for project in (1, 2, 3):
        for number, image in enumerate(images, 1):
            _annotate(running, project, number, image)
        body = capture("POST_webhook_START_TRAINING")
        body["project"]["id"] = project
        assert running.post("/webhook", body).json()["status"] == "queued"

    # One training runs for each device of each host: the second worker of host a stands by.
    taken = wait_for(
        lambda: (
            len(found := _running_on(seen, JobKind.TRAIN)) == 2 and job_processes(on_b) and found
        ),
        within=LONG,
        what=f"two trainings run at once: {running.tail()}",
    )
    assert set(taken) == {"a", "b"}
    assert sorted(job.state for job in all_jobs(seen)) == ["queued", "running", "running"]
    busy, idle = _busy(on_a)
    _kill(busy)
    _kill(on_b)
    # The other worker of host a takes over the device, and begins a training of the queue, where
    # that of the killed worker is again.
    wait_for(lambda: job_processes(idle), within=LONG, what="host a goes on with trainings")
    # It queues the training of host b as well, as soon as the worker there counts as lost.
    _silence(seen, taken["b"])

    def is_queued_again() -> bool:
        job = seen.jobs.get(taken["b"])
        return job is not None and job.state == JobState.QUEUED

    wait_for(is_queued_again, within=LONG, what="the training of host b is queued again")
    _hold(tmp_path).unlink()
    wait_for(
        lambda: {job.state for job in all_jobs(seen)} == {JobState.DONE},
        within=LONG,
        what=f"all trainings are done: {running.tail()}",
    )
    done = all_jobs(seen)
    assert {job.host for job in done} == {"a"}
    assert {job.id: job.attempt for job in done} == {
        job.id: 2 if job.id in taken.values() else 1 for job in done
    }
    with seen.database.reading() as session:
        keys = {job.id: session.get_one(Project, job.project_id).key for job in done}
    for job in done:
        (version,) = seen.versions.all(job.project_id)
        assert version.name == job.version
    # The server loads, from the S3 server, a version that it shares no file with.
    assert job.version is not None
    seen.versions.promote(job.project_id, job.version)
    assert not seen.artefacts.folder(keys[job.id], job.version).exists()
    body = {"project": keys[job.id], "tasks": [{"id": 1, "data": _data(images[0])}]}
    answer = running.post("/predict", body).json()
    assert [result["model_version"] for result in answer["results"]] == [job.version]
    seen.database.close()


def test_auto_labelling_shards_are_shared_by_hosts_and_survive_a_killed_worker(
    hosts: Callable[..., Hosts], label_studio: LabelStudioServer, tmp_path: Path
) -> None:
    images = {i.name: i for i in generate(22, seed=61, width=96, height=72)}
    number, tasks = create_project(
        label_studio, "Shared", LABEL_CONFIG, {name: i.encoded() for name, i in images.items()}
    )
    annotated = dict(list(tasks.items())[:6])
    annotate(label_studio, {task: images[name] for name, task in annotated.items()})
    running = hosts(
        LABEL_STUDIO_URL=label_studio.url,
        LABEL_STUDIO_API_KEY=label_studio.login.token,
        ML_BACKEND_AUTO_LABEL_SHARD="5",
    )
    seen = running.backend_of(SERVER)
    key = LabelStudioClient(label_studio.url, label_studio.login.token).project(number).key
    project = seen.ingest.introduce(key, number, label_config=LABEL_CONFIG).id
    asked = seen.requests.training(project, trigger=Trigger.COMMAND, forced=True)
    on_a = running.start_worker("a")
    on_b = [running.start_worker("b"), running.start_worker("b")]

    def ended(job: int) -> Job | None:
        found = seen.jobs.get(job)
        assert found is not None
        return found if found.finished_at is not None else None

    trained = wait_for(
        lambda: ended(asked.job), within=LONG, what=f"the training is done: {running.tail()}"
    )
    assert (trained.state, trained.host in {"a", "b"}) == (JobState.DONE, True), trained.reason
    running.wait_for_workers(2, standing_by=1)
    _hold(tmp_path).touch()
    seen.versions.promote(project, trained.version)
    labelling = seen.requests.autolabel(project, trigger=Trigger.COMMAND, forced=True)
    assert labelling is not None
    taken = wait_for(
        lambda: (
            len(found := _running_on(seen, JobKind.AUTOLABEL_SHARD)) == 2
            and job_processes(on_a)
            and found
        ),
        within=LONG,
        what=f"two shards run at once: {running.tail()}",
    )
    assert set(taken) == {"a", "b"}
    busy, idle = _busy(on_b)
    _kill(busy)
    # The killed worker's shard is in the queue again, for any of the others.
    wait_for(lambda: job_processes(idle), within=LONG, what="host b goes on with shards")
    _hold(tmp_path).unlink()
    done = wait_for(
        lambda: ended(labelling.job), within=LONG, what=f"all are predicted: {running.tail()}"
    )
    assert done.state == JobState.DONE, done.reason
    assert done.reason.values["imported"] == 16
    shards = [job for job in all_jobs(seen) if job.kind == JobKind.AUTOLABEL_SHARD]
    assert [job.state for job in shards] == [JobState.DONE] * 4
    assert {job.host for job in shards} == {"a", "b"}
    # One host trained the version, and both predicted with it.
    for host in ("a", "b"):
        assert running.backend_of(host).artefacts.folder(key, trained.version).is_dir()
    assert predictions_held(label_studio, number) == Counter(
        {(task, trained.version): 1 for name, task in tasks.items() if name not in annotated}
    )
    seen.database.close()
