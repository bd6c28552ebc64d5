"""Kill a running backend's processes, fill its disk, start it twice: its promises must hold."""

from __future__ import annotations

import base64
import functools
import random
import resource
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
import torch
from sqlalchemy import select

from ml_backend.backend import Backend
from ml_backend.demo.label_studio_server import LabelStudioServer
from ml_backend.demo.project import LABEL_CONFIG, create_project, regions
from ml_backend.demo.shapes import SHAPES, generate
from ml_backend.detection.detector import Detector
from ml_backend.detection.presets import preset_named
from ml_backend.jobs.jobs import ATTEMPTS
from ml_backend.label_studio.client import LabelStudioClient
from ml_backend.label_studio.events import AnnotationsChanged, parse_event
from ml_backend.reasons import Code, Reason
from ml_backend.settings import load_settings
from ml_backend.store.states import ACTIVE, JobKind, JobState
from ml_backend.store.tables import Annotation, Job, ModelVersion, Project
from ml_backend.wording import words
from ml_backend.worker import supervisor
from ml_backend.worker.supervisor import Limits, limits_of, supervise
from tests import stand_in
from tests.conftest import ROOT, RunningBackend, capture, make_live, predictions_held, wait_for
from tests.job_process import claim, run_job
from tests.steps import Steps

ELSEWHERE = "987654.1795463889"
"""Key of a project of another Label Studio, from which only webhooks arrive."""
VICTIMS = (
    *("training", "worker", "auto-labelling", "server", "everything"),
    *("worker", "training", "server", "auto-labelling", "worker"),
)
_PICTURES = [
    base64.b64encode(image.encoded()).decode()
    for image in generate(6, seed=71, width=128, height=96, most=2)
]
_REGIONS = [regions(image) for image in generate(6, seed=71, width=128, height=96, most=2)]


def _detector() -> Detector:
    cpu = torch.device("cpu")
    detector = Detector.pretrained(preset_named(stand_in.REFERENCE, cpu), SHAPES[:3], "none", cpu)
    detector.thresholds = dict.fromkeys(SHAPES[:3], 0.5)
    return detector


def _event(number: int) -> dict[str, Any]:
    body = capture("POST_webhook_ANNOTATION_CREATED")
    body["project"] |= {"id": 987654, "label_config": LABEL_CONFIG}
    body["annotation"] |= {"id": number, "task": number % 20 + 1, "result": _REGIONS[number % 6]}
    body["task"]["id"] = number % 20 + 1
    body["task"]["data"] = {"image": f"data:image/jpeg;base64,{_PICTURES[number % 6]}"}
    return body


class Annotators:
    """Send one annotation after the other, and remember which were acknowledged.

    Attributes:
        acknowledged: ids of the annotations that were answered with a success.
        number: id of the newest annotation.
    """

    def __init__(self, backend: RunningBackend) -> None:
        self._backend = backend
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._work)
        self.acknowledged: set[int] = set()
        self.number = 0

    def __enter__(self) -> Annotators:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()

    def went_on(self, before: int) -> bool:
        """Return whether more annotations are acknowledged than before."""
        return len(self.acknowledged) > before

    def _work(self) -> None:
        while not self._stopping.wait(0.1):
            self.number += 1
            try:
                answer = requests.post(
                    f"{self._backend.url}/webhook", json=_event(self.number), timeout=10
                )
            except requests.RequestException:
                continue
            if answer.ok:
                self.acknowledged.add(self.number)


@pytest.fixture(scope="module")
def running(
    label_studio: LabelStudioServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningBackend]:
    """Prepare a backend that trains whenever an annotation arrives; tests start it."""
    backend = RunningBackend(
        tmp_path_factory.mktemp("faults"),
        PYTHONPATH=str(ROOT),
        LABEL_STUDIO_URL=label_studio.url,
        LABEL_STUDIO_API_KEY=label_studio.login.token,
        ML_BACKEND_PRESET=stand_in.REFERENCE,
        ML_BACKEND_TRAIN_MIN="2",
        ML_BACKEND_TRAIN_EVERY="1",
        ML_BACKEND_TRAIN_GROWTH="0",
        ML_BACKEND_TRAIN_DELAY="0",
        ML_BACKEND_TRAIN_THREADS="1",
    )
    yield backend
    backend.stop()


@pytest.fixture(scope="module")
def seen(running: RunningBackend) -> Backend:
    """Open the running backend's database and artefacts in this process."""
    return Backend(load_settings(running.settings))


def _processes(backend: RunningBackend) -> dict[str, list[psutil.Process]]:
    """Return the backend's processes by their role."""
    found: dict[str, list[psutil.Process]] = {}
    serve = psutil.Process(backend.pid)
    for process in serve.children(recursive=True):
        try:
            line = " ".join(process.cmdline())
            under_gunicorn = "gunicorn" in " ".join(process.parent().cmdline())  # type: ignore[union-attr]
        except (psutil.NoSuchProcess, AttributeError):
            continue
        for name, part in (
            ("training", "ml_backend.programs.job train "),
            ("auto-labelling", "ml_backend.programs.job autolabel "),
            ("worker", "ml_backend.cli worker"),
        ):
            if part in line:
                found.setdefault(name, []).append(process)
        if under_gunicorn:
            found.setdefault("server", []).append(process)
    found["everything"] = [serve, *serve.children(recursive=True)]
    return found


def _named(backend: RunningBackend, name: str) -> list[psutil.Process]:
    return _processes(backend).get(name, [])


def _answers(backend: RunningBackend) -> bool:
    try:
        return requests.get(f"{backend.url}/health", timeout=2).ok
    except requests.RequestException:
        return False


def _assert_acknowledged_are_stored(seen: Backend, acknowledged: set[int]) -> None:
    with seen.database.reading() as session:
        stored = set(session.scalars(select(Annotation.label_studio_id)))
    assert acknowledged <= stored


def _assert_each_project_has_one_live_version_that_loads(seen: Backend) -> None:
    with seen.database.reading() as session:
        for project in session.scalars(select(Project)):
            (live,) = session.scalars(
                select(ModelVersion.name).where(
                    ModelVersion.project_id == project.id, ModelVersion.state == "live"
                )
            ).all()
            assert live == project.live_version
            Detector.load(seen.artefacts.existing(project.key, live), torch.device("cpu"))


def _all_jobs_ended(seen: Backend) -> bool:
    """Return whether every training and auto-labelling has ended."""
    with seen.database.reading() as session:
        projects = session.scalars(select(Project)).all()
        busy = session.scalars(
            select(Job).where(Job.state.in_(ACTIVE), Job.kind != JobKind.REMOVE_STALE)
        ).all()
    return not busy and all(p.trained_revision >= p.revision for p in projects)


def test_running_backend_processes_killed_loses_doubles_and_blocks_nothing(
    label_studio: LabelStudioServer, running: RunningBackend, seen: Backend
) -> None:
    images = {i.name: i.encoded() for i in generate(30, seed=72, width=128, height=96)}
    number, tasks = create_project(label_studio, "Killed for real", LABEL_CONFIG, images)
    key = LabelStudioClient(label_studio.url, label_studio.login.token).project(number).key
    detector = _detector()
    make_live(seen, detector, "a0", key=key, label_config=LABEL_CONFIG)
    make_live(seen, detector, "v0", key=ELSEWHERE, label_config=LABEL_CONFIG)
    running.start()

    chance = random.Random(0)
    reasons = set()
    with Annotators(running) as annotators:
        for seed, name in enumerate(VICTIMS):
            if name == "auto-labelling":
                make_live(seen, detector, f"a{seed}", key=key, label_config=LABEL_CONFIG)
            victims = wait_for(
                functools.partial(_named, running, name), within=60, what=name, every=0.02
            )
            # A random moment of the process's life: a training and auto-labelling both need three
            # seconds to begin.
            time.sleep(chance.uniform(0, 4 if name in ("training", "auto-labelling") else 1))
            for victim in victims:
                if victim.is_running():
                    victim.kill()
            if name == "everything":
                psutil.wait_procs(victims, 20)
                running.kill()
                running.start()
            before = len(annotators.acknowledged)
            wait_for(
                functools.partial(annotators.went_on, before),
                within=60,
                what="annotations are acknowledged again",
            )
            _assert_acknowledged_are_stored(seen, set(annotators.acknowledged))
            _assert_each_project_has_one_live_version_that_loads(seen)
            with seen.database.reading() as session:
                jobs = session.scalars(select(Job)).all()
            reasons |= {words(job.reason).partition(";")[0] for job in jobs}
    assert len(annotators.acknowledged) > len(VICTIMS)
    assert "the training was killed (out of memory, most likely)" in reasons

    wait_for(
        functools.partial(_all_jobs_ended, seen),
        within=240,
        what=f"every job ends: {running.tail()}",
        every=1,
    )
    _assert_acknowledged_are_stored(seen, annotators.acknowledged)
    _assert_each_project_has_one_live_version_that_loads(seen)
    held = predictions_held(label_studio, number)
    assert set(held.values()) == {1}
    with seen.database.reading() as session:
        live = session.scalars(select(Project.live_version).where(Project.key == key)).one()
    assert {task for task, version in held if version == live} == set(tasks.values())


def test_webhook_disk_full_answers_503_and_keeps_what_was_acknowledged(
    running: RunningBackend, seen: Backend
) -> None:
    if not _answers(running):
        running.start()
    task = {"id": 1, "data": {"image": f"data:image/jpeg;base64,{_PICTURES[0]}"}}
    body = {"tasks": [task], "project": ELSEWHERE, "label_config": LABEL_CONFIG}
    make_live(seen, _detector(), "roomy", key=ELSEWHERE, label_config=LABEL_CONFIG)
    wait_for(
        lambda: running.post("/predict", body).json()["model_version"] == "roomy",
        within=20,
        what="the version predicts",
    )
    family = [p for p in _processes(running)["everything"] if p.is_running()]
    before = {p.pid: resource.prlimit(p.pid, resource.RLIMIT_FSIZE) for p in family}
    for process in family:
        # These processes cannot write to any file, as if the disk were full for them alone.
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (0, before[process.pid][1]))
    refused = running.post("/webhook", _event(500_001))
    assert refused.status_code == 503
    assert "the database or the queue cannot be used" in refused.json()["error"]
    assert "Traceback" not in refused.text
    assert running.get("/health").ok
    assert running.get("/metrics").ok
    predicted = running.post("/predict", body)
    assert (predicted.status_code, predicted.json()["model_version"]) == (200, "roomy")
    for process in family:
        if process.is_running():
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, before[process.pid])
    assert running.post("/webhook", _event(500_002)).json() == {"status": "stored", "changed": 1}
    with seen.database.reading() as session:
        stored = set(session.scalars(select(Annotation.label_studio_id)))
    assert 500_002 in stored
    assert 500_001 not in stored


def test_two_servers_one_folder_work_as_one(running: RunningBackend, seen: Backend) -> None:
    if not _answers(running):
        running.start()
    # On the same port the second one ends, with status 2.
    again = running.command("serve", status=2)
    assert again == ""
    second = RunningBackend(running.log.parent / "second", **running.settings)
    second.log.parent.mkdir()
    second.settings |= {"PORT": str(second.port), "MODEL_DIR": str(running.model_dir)}
    # A folder that a training of another project is writing.
    folder = running.model_dir / "projects" / "1.1" / ".building-now"
    folder.mkdir(parents=True)
    second.start()
    try:
        for number, backend in enumerate((running, second), 600_001):
            assert backend.post("/webhook", _event(number)).ok
        with seen.database.reading() as session:
            stored = set(session.scalars(select(Annotation.label_studio_id)))
        assert {600_001, 600_002} <= stored
        # Both have a worker, and one of the workers has the device and all jobs.
        wait_for(lambda: _named(running, "training"), within=60, what="a training runs", every=0.02)
        assert _named(second, "worker")
        assert not _named(second, "training")
        assert folder.is_dir()
    finally:
        second.stop()


# A training without a server


class _Queued:
    """Six stored annotations and a training of a stand-in that is in the queue.

    Args:
        folder: `MODEL_DIR`.
        preset: name of the stand-in.
        settings: more settings, by their environment names.

    Attributes:
        settings: environment variables for the processes that do the training.
        backend: where everything is stored.
        job: number of the training.
    """

    def __init__(self, folder: Path, preset: str, **settings: str) -> None:
        self.settings = {
            "MODEL_DIR": str(folder),
            "ML_BACKEND_PRESET": f"tests.stand_in:{preset}",
            "ML_BACKEND_WEIGHTS": "none",
            "ML_BACKEND_DEVICE": "cpu",
            "ML_BACKEND_TRAIN_THREADS": "1",
            **settings,
        }
        self.backend = Backend(load_settings(self.settings))
        make_live(self.backend, _detector(), "v0", key=ELSEWHERE, label_config=LABEL_CONFIG)
        for number in range(1, 7):
            event = parse_event(_event(number))
            assert isinstance(event, AnnotationsChanged)
            self.backend.ingest.apply(event, event.project)
        with self.backend.database.reading() as session:
            project = session.scalars(select(Project)).one()
        self.job = self.backend.requests.training(project.id, forced=True).job

    def row(self) -> Job:
        """Return the training."""
        job = self.backend.jobs.get(self.job)
        assert job is not None
        return job

    def supervise(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Run the training's process to its end under the real supervisor, as a worker does."""
        for name, value in {**self.settings, "PYTHONPATH": str(ROOT)}.items():
            monkeypatch.setenv(name, value)
        stopping = threading.Event()
        run = self.backend.job_run(claim(self.backend, self.job), stopping)
        supervise(run, self.backend.settings, stopping, prepared={})


def _why(job: Job) -> Reason:
    """Return why a job is tried again."""
    assert job.reason.code == Code.TRIED_AGAIN, job.reason
    return Reason.of(job.reason.values["why"])


def _run_with_little_room(job: int) -> int:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 21, resource.RLIM_INFINITY))
    return run_job(job)


@pytest.mark.slow
def test_training_disk_full_at_checkpoint_fails_with_a_reason(tmp_path: Path) -> None:
    queued = _Queued(tmp_path, "LARGE")
    steps = Steps(queued.settings, _run_with_little_room)
    for attempt in range(1, ATTEMPTS + 1):
        steps.count(queued.job)
        job = queued.row()
        assert "the training could not write or read a file: " in words(job.reason)
        assert "File too large" in words(job.reason)
        state = JobState.FAILED if attempt == ATTEMPTS else JobState.QUEUED
        assert (job.state, job.attempt) == (state, attempt)
    folder = tmp_path / "projects" / ELSEWHERE
    assert [path.name for path in folder.iterdir()] == ["v0"]
    with queued.backend.database.reading() as session:
        assert session.scalars(select(Project.live_version)).one() == "v0"


def _processes_of_jobs() -> list[psutil.Process]:
    """Return the processes that do jobs, and their own children, below this one."""
    return [
        process
        for child in psutil.Process().children()
        if "ml_backend.programs.job" in child.cmdline()
        for process in (child, *child.children(recursive=True))
    ]


@pytest.mark.slow
def test_supervisor_training_hangs_ends_it_with_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queued = _Queued(tmp_path, "HANGING", ML_BACKEND_TRAIN_BUDGET="1")
    # The limit of a real training is longer than this test can wait, but there is one.
    real = limits_of(JobKind.TRAIN, queued.backend.settings)
    assert real.silence <= queued.backend.settings.train_budget + 900
    monkeypatch.setattr(supervisor, "limits_of", lambda *_: Limits(silence=6))
    queued.supervise(monkeypatch)
    assert _processes_of_jobs() == []
    job = queued.row()
    assert (job.state, job.attempt) == (JobState.QUEUED, 1)
    why = _why(job)
    assert why.code == Code.NO_PROGRESS
    assert words(why) == "the training came no further for 0.1 minutes and was ended"


@pytest.mark.slow
def test_supervisor_training_over_its_time_limit_ends_it_counting_from_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queued = _Queued(tmp_path, "STALLING", TEST_STALLED=str(tmp_path / "stalled"))
    real = limits_of(JobKind.TRAIN, queued.backend.settings)
    assert real.training is not None
    assert real.training >= real.silence
    limit = stand_in.BUILT_WITHIN / 2
    monkeypatch.setattr(supervisor, "limits_of", lambda *_: Limits(silence=600, training=limit))
    # The supervisor looks at the limits at each heartbeat.
    monkeypatch.setattr(supervisor, "HEARTBEAT", limit / 4)
    queued.supervise(monkeypatch)
    assert _processes_of_jobs() == []
    # Before the first step it took longer than the limit, and came to the second one.
    assert (tmp_path / "stalled").exists()
    job = queued.row()
    assert (job.state, job.attempt) == (JobState.QUEUED, 1)
    assert _why(job).code == Code.TIME_LIMIT
