"""Kill a running backend's processes, fill its disk, start it twice: its promises must hold."""

from __future__ import annotations

import base64
import functools
import os
import random
import resource
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
import torch
from filelock import Timeout
from sqlalchemy import select, update

from ml_backend.backend import Backend
from ml_backend.demo.label_studio_server import LabelStudioServer
from ml_backend.demo.project import LABEL_CONFIG, create_project, regions
from ml_backend.demo.shapes import SHAPES, generate
from ml_backend.detection.detector import Detector
from ml_backend.detection.presets import preset_named
from ml_backend.jobs.jobs import STALE_AFTER
from ml_backend.label_studio.client import LabelStudioClient
from ml_backend.label_studio.events import AnnotationsChanged, parse_event
from ml_backend.settings import load_settings
from ml_backend.store.tables import Annotation, Job, ModelVersion, Project, now
from ml_backend.worker.supervisor import Program, supervise, training
from ml_backend.worker.worker import turn
from tests import stand_in
from tests.conftest import ROOT, RunningBackend, capture, make_live, predictions_held, wait_for
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
    """Open the running backend's database and registry in this process."""
    return Backend(load_settings(running.settings))


def _processes(backend: RunningBackend) -> dict[str, list[psutil.Process]]:
    """Return the backend's processes by their role."""
    found: dict[str, list[psutil.Process]] = {}
    serve = psutil.Process(backend.pid)
    for process in serve.children(recursive=True):
        try:
            words = " ".join(process.cmdline())
            under_gunicorn = "gunicorn" in " ".join(process.parent().cmdline())  # type: ignore[union-attr]
        except (psutil.NoSuchProcess, AttributeError):
            continue
        for name, part in (
            ("training", "ml_backend.programs.train"),
            ("auto-labelling", "ml_backend.programs.predict"),
            ("worker", "ml_backend.cli worker"),
        ):
            if part in words:
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
            Detector.load(seen.registry.existing(project.key, live), torch.device("cpu"))


def _let_abandoned_jobs_be_taken_over(seen: Backend, killed_at: datetime) -> None:
    """Pretend that the time has passed after which a silent job counts as abandoned."""
    with seen.database.session() as session:
        session.execute(
            update(Job)
            .where(Job.state == "running", Job.heartbeat_at < killed_at)
            .values(heartbeat_at=now() - 2 * STALE_AFTER)
        )


def _all_jobs_ended(seen: Backend) -> bool:
    """Return whether every training and auto-labelling has ended; retries are due at once."""
    with seen.database.session() as session:
        session.execute(
            update(Job).where(Job.state == "queued", Job.kind != "tidy").values(not_before=None)
        )
        projects = session.scalars(select(Project)).all()
        busy = session.scalars(
            select(Job).where(Job.state.in_(("waiting", "queued", "running")), Job.kind != "tidy")
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
            killed_at = now()
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
            if name in ("worker", "everything"):
                _let_abandoned_jobs_be_taken_over(seen, killed_at)
            _assert_acknowledged_are_stored(seen, set(annotators.acknowledged))
            _assert_each_project_has_one_live_version_that_loads(seen)
            with seen.database.reading() as session:
                reasons |= {job.reason.partition(";")[0] for job in session.scalars(select(Job))}
    assert len(annotators.acknowledged) > len(VICTIMS)
    assert "the training was killed (out of memory, most likely)" in reasons

    wait_for(
        functools.partial(_all_jobs_ended, seen),
        within=120,
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
    folder = running.model_dir / "projects" / ELSEWHERE / ".building-now"
    folder.mkdir(parents=True)
    with wait_for(lambda: _training_lock(seen), within=60, what="no training runs"):
        # The start of another server must not remove the folder that a training is writing.
        second.start()
        assert folder.is_dir()
    try:
        for number, backend in enumerate((running, second), 600_001):
            assert backend.post("/webhook", _event(number)).ok
        with seen.database.reading() as session:
            stored = set(session.scalars(select(Annotation.label_studio_id)))
        assert {600_001, 600_002} <= stored
    finally:
        second.stop()


def _training_lock(seen: Backend) -> Any:
    """Take the lock that only one training can have; return None while a training has it."""
    lock = turn(seen.settings, "train")
    try:
        lock.acquire()
    except Timeout:
        return None
    return lock


# A training without a server


def _queue_training(folder: Path, preset: str) -> tuple[Backend, int]:
    """Store six annotations and queue a training; return the backend and the job's number."""
    settings = {
        "MODEL_DIR": str(folder),
        "ML_BACKEND_PRESET": f"tests.stand_in:{preset}",
        "ML_BACKEND_WEIGHTS": "none",
        "ML_BACKEND_DEVICE": "cpu",
        "ML_BACKEND_TRAIN_THREADS": "1",
    }
    backend = Backend(load_settings(settings))
    make_live(backend, _detector(), "v0", key=ELSEWHERE, label_config=LABEL_CONFIG)
    for number in range(1, 7):
        event = parse_event(_event(number))
        assert isinstance(event, AnnotationsChanged)
        backend.ingest.apply(event, event.project)
    with backend.database.reading() as session:
        project = session.scalars(select(Project)).one()
    number = backend.jobs.consider_training(project.id, forced=True).job
    return backend, number


def _train_with_little_room(job: int) -> int:
    from ml_backend.programs.train import main

    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 21, resource.RLIM_INFINITY))
    return main(job, os.getppid())


@pytest.mark.slow
def test_training_disk_full_at_checkpoint_fails_with_a_reason(tmp_path: Path) -> None:
    backend, number = _queue_training(tmp_path, "LARGE")
    settings = {
        **{k: v for k, v in os.environ.items() if k == "PATH"},
        "MODEL_DIR": str(tmp_path),
        "ML_BACKEND_PRESET": "tests.stand_in:LARGE",
        "ML_BACKEND_WEIGHTS": "none",
        "ML_BACKEND_DEVICE": "cpu",
    }
    steps = Steps(settings, _train_with_little_room)
    for attempt in (1, 2, 3):
        assert backend.jobs.claim(number) is not None
        steps.count(number, status=3)
        job = backend.jobs.get(number)
        assert job is not None
        assert "the training could not write or read a file: " in job.reason
        assert "File too large" in job.reason
        assert (job.state, job.attempt) == ("failed" if attempt == 3 else "queued", attempt)
        with backend.database.session() as session:
            session.execute(update(Job).values(not_before=None))
    folder = tmp_path / "projects" / ELSEWHERE
    assert [path.name for path in folder.iterdir()] == ["v0"]
    with backend.database.reading() as session:
        assert session.scalars(select(Project.live_version)).one() == "v0"


@pytest.mark.slow
def test_supervisor_training_hangs_ends_it_with_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, number = _queue_training(tmp_path, "HANGING")
    assert backend.jobs.claim(number) is not None
    for name, value in {
        "MODEL_DIR": str(tmp_path),
        "ML_BACKEND_PRESET": "tests.stand_in:HANGING",
        "ML_BACKEND_WEIGHTS": "none",
        "ML_BACKEND_DEVICE": "cpu",
        "PYTHONPATH": str(ROOT),
    }.items():
        monkeypatch.setenv(name, value)
    # The limit of a real training is longer than this test can wait, but there is one.
    real = training(backend.settings)
    assert real.silence is not None
    assert real.silence <= backend.settings.train_budget + 900
    program = Program(real.module, real.what, silence=6)
    ended = supervise(program, number, backend.jobs, backend.settings, threading.Event())
    assert ended.status == "crashed"
    assert ended.reason == "the training came no further for 0.1 minutes and was ended"
    me = psutil.Process()
    assert not [c for c in me.children() if real.module in c.cmdline()]
    job = backend.jobs.get(number)
    assert job is not None
    assert job.state == "running"
    assert backend.jobs.try_again(number, ended.reason, wait=0)
