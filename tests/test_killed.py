"""Send SIGKILL before and after steps with lasting effects: a write, rename, commit or request.

The real code runs in a process of its own, which is killed at one of its steps; the kills are
spread evenly over the steps. Then the stored state is checked, and the work is started again, as
after a restart.
"""

from __future__ import annotations

import base64
import os
import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from sqlalchemy import select, update

from ml_backend.backend import Backend
from ml_backend.demo.label_studio_server import LabelStudioServer
from ml_backend.demo.project import LABEL_CONFIG, create_project, regions
from ml_backend.demo.shapes import SHAPES, generate
from ml_backend.detection.detector import Detector
from ml_backend.detection.presets import preset_named
from ml_backend.jobs.jobs import ATTEMPTS, STALE_AFTER
from ml_backend.label_studio.client import LabelStudioClient
from ml_backend.label_studio.events import AnnotationsChanged, parse_event
from ml_backend.reasons import Code
from ml_backend.settings import load_settings
from ml_backend.store.database import Database
from ml_backend.store.states import JobState
from ml_backend.store.tables import Annotation, Job, ModelVersion, Project, now
from tests import stand_in
from tests.conftest import capture, make_live, predictions_held
from tests.job_process import HOST, run_job
from tests.steps import Steps

pytestmark = pytest.mark.slow

KEY = "7.1795463889"
STORING, TRAINING, AUTO_LABELLING, MIGRATING = 10, 24, 10, 6
"""Numbers of kills, fifty in all."""
CPU = torch.device("cpu")


def _spread(kills: int, steps: int) -> Iterator[int]:
    """Yield the numbers of as many steps as there are kills, evenly spread."""
    assert steps >= kills, f"{steps} steps are too few"
    return iter(1 + number * steps // kills for number in range(kills))


def _settings(folder: Path, **more: str) -> dict[str, str]:
    return {
        "MODEL_DIR": str(folder),
        "ML_BACKEND_PRESET": stand_in.REFERENCE,
        "ML_BACKEND_WEIGHTS": "none",
        "ML_BACKEND_DEVICE": "cpu",
        "ML_BACKEND_TRAIN_THREADS": "1",
        **more,
    }


def _stand_in() -> Detector:
    detector = Detector.pretrained(preset_named(stand_in.REFERENCE, CPU), SHAPES[:3], "none", CPU)
    detector.thresholds = dict.fromkeys(SHAPES[:3], 0.5)
    return detector


def _check_versions(backend: Backend) -> str:
    """Check that one version is live and that all kept ones load; return the live version."""
    with backend.database.reading() as session:
        project = session.scalars(select(Project)).one()
        versions = session.scalars(select(ModelVersion)).all()
    (live,) = [v.name for v in versions if v.state == "live"]
    assert live == project.live_version
    for version in versions:
        # Versions that can be rolled back to must load as well.
        if version.state != "pruned":
            Detector.load(backend.artefacts.existing(project.key, version.name), CPU)
    return live


# Storing an event


def _store(first: int, receipts: str) -> int:
    """Post ten annotations to the application; write the id of each acknowledged one to a file."""
    from ml_backend.http.app import create_app

    backend = Backend(load_settings())
    client = create_app(backend).test_client()
    with Path(receipts).open("a", buffering=1) as file:
        for number in range(first, first + 10):
            if client.post("/webhook", json=_event(number)).status_code == 200:
                file.write(f"{number}\n")
    # `os._exit` does not wait for threads.
    os._exit(0)


def _event(number: int) -> dict[str, Any]:
    body = capture("POST_webhook_ANNOTATION_CREATED")
    body["annotation"] |= {"id": number, "task": number}
    body["task"]["id"] = number
    return body


def test_webhook_killed_at_any_step_keeps_what_was_acknowledged(tmp_path: Path) -> None:
    settings = _settings(tmp_path / "state")
    steps = Steps(settings, _store)
    receipts = tmp_path / "receipts"
    # The first start also migrates the database.
    steps.count(1, str(receipts))
    total = steps.count(101, str(receipts))
    for number, step in enumerate(_spread(STORING, total), 1):
        assert steps.killed_at(step, 1000 * number, str(receipts))
    backend = Backend(load_settings(settings))
    with backend.database.reading() as session:
        stored = set(session.scalars(select(Annotation.label_studio_id)))
        revision = session.scalars(select(Project.revision)).one()
        tasks = session.scalars(select(Annotation.task_id)).all()
    acknowledged = {int(line) for line in receipts.read_text().split()}
    assert len(acknowledged) > 10
    assert acknowledged <= stored
    # Each kill can leave one annotation that is stored and was not acknowledged, and none in part.
    assert len(stored - acknowledged) <= STORING
    assert (revision, None in tasks) == (len(stored), False)


# Training and auto-labelling: the worker's side of a run and the side of the job's process


def _silent(backend: Backend, number: int) -> None:
    """Let a job's last heartbeat lie so far back that its worker counts as lost."""
    with backend.database.session() as session:
        session.execute(
            update(Job).where(Job.id == number).values(heartbeat_at=now() - 2 * STALE_AFTER)
        )


def _recover(backend: Backend, number: int) -> None:
    """Put a killed job back as a worker of another host does; the killed run's entry is void."""
    job = _job(backend, number)
    _silent(backend, number)
    assert backend.jobs.recover() == [f"job-{number}-run-{job.run}"]
    assert backend.jobs.claim(number, job.run, HOST) is None
    assert _job(backend, number).state in (JobState.QUEUED, JobState.FAILED)


def _give_up(backend: Backend, number: int) -> None:
    """Let the queue start a run once more whose attempts are used up."""
    assert backend.jobs.claim(number, _job(backend, number).run, HOST) is None
    failed = _job(backend, number)
    assert failed.state == JobState.FAILED
    assert failed.reason.code == Code.GAVE_UP


def _job(backend: Backend, number: int) -> Job:
    job = backend.jobs.get(number)
    assert job is not None
    return job


def test_training_killed_at_any_step_leaves_one_live_version_and_no_orphan(tmp_path: Path) -> None:
    settings = _settings(tmp_path, ML_BACKEND_KEEP_VERSIONS="2")
    backend = Backend(load_settings(settings))
    make_live(backend, _stand_in(), "v0", key=KEY, label_config=LABEL_CONFIG)
    for number, image in enumerate(generate(6, seed=51, width=128, height=96, most=2), 1):
        encoded = base64.b64encode(image.encoded()).decode()
        body = _event(number)
        body["project"] |= {"id": 7, "label_config": LABEL_CONFIG}
        body["annotation"]["result"] = regions(image)
        body["task"]["data"] = {"image": f"data:image/jpeg;base64,{encoded}"}
        event = parse_event(body)
        assert isinstance(event, AnnotationsChanged)
        backend.ingest.apply(event, event.project)
    with backend.database.reading() as session:
        project = session.scalars(select(Project)).one()
    steps = Steps(settings, run_job)
    artefacts = tmp_path / "projects" / KEY

    def asked_for() -> int:
        """Return the training that is to run: the killed one, or a new one after its end."""
        number = backend.requests.training(project.id, forced=True).job
        job = _job(backend, number)
        if job.state == JobState.RUNNING and job.attempt >= ATTEMPTS:
            _give_up(backend, number)
            number = backend.requests.training(project.id, forced=True).job
        return number

    seen, states, orphans = set[str](), Counter[str](), 0
    # The second one also prunes, as every later one does.
    for _ in range(2):
        whole = asked_for()
        total = steps.count(whole)
        assert _job(backend, whole).state == JobState.DONE
        seen.add(_check_versions(backend))
    for kill, step in enumerate(_spread(TRAINING, total)):
        number = asked_for()
        # A run may have fewer steps than the counted one.
        killed = steps.killed_at(step, number)
        assert killed or step > total - 5
        seen.add(_check_versions(backend))
        orphans += len(_unrecorded(backend, artefacts))
        state = _job(backend, number).state
        states[state] += 1
        # Either the queue starts the same run again, or another host puts the job back.
        if state == JobState.RUNNING and kill % 2:
            _recover(backend, number)
    last = asked_for()
    steps.count(last)
    assert _job(backend, last).state == JobState.DONE
    seen.add(_check_versions(backend))
    assert len(seen) > 3
    # Most were killed within their run, some before or after it.
    assert states[JobState.RUNNING] > TRAINING // 2, states
    # Some trainings were killed between the writing of an artefact and the record of its version.
    assert orphans > 0
    assert _unrecorded(backend, artefacts) == set()
    assert [path.name for path in artefacts.iterdir() if path.name[0] == "."] == []
    assert list((tmp_path / "training").iterdir()) == []


def _unrecorded(backend: Backend, artefacts: Path) -> set[str]:
    """Return the names of the artefacts that no version which is kept has."""
    with backend.database.reading() as session:
        kept = session.scalars(select(ModelVersion.name).where(ModelVersion.state != "pruned"))
        return {path.name for path in artefacts.iterdir() if path.name[0] != "."} - set(kept)


def test_autolabel_killed_at_any_step_doubles_no_prediction(
    label_studio: LabelStudioServer, tmp_path: Path
) -> None:
    images = {i.name: i.encoded() for i in generate(45, seed=52, width=128, height=96)}
    number, tasks = create_project(label_studio, "Killed", LABEL_CONFIG, images)
    settings = _settings(
        tmp_path,
        LABEL_STUDIO_URL=label_studio.url,
        LABEL_STUDIO_API_KEY=label_studio.login.token,
    )
    backend = Backend(load_settings(settings))
    key = LabelStudioClient(label_studio.url, label_studio.login.token).project(number).key
    steps = Steps(settings, run_job)
    detector = _stand_in()

    def live(version: str) -> int:
        """Make a version live; return the auto-labelling that follows."""
        make_live(backend, detector, version, key=key, label_config=LABEL_CONFIG)
        with backend.database.reading() as session:
            project = session.scalars(select(Project)).one()
        asked = backend.requests.autolabel(project.id)
        assert asked is not None
        return asked.job

    # Only the first run asks whether the project exists, so that its steps are not the usual ones.
    steps.count(live("v0"))
    total = steps.count(live("v1"))
    expected = Counter((task, version) for task in tasks.values() for version in ("v0", "v1"))
    assert predictions_held(label_studio, number) == expected
    for attempt, step in enumerate(_spread(AUTO_LABELLING, total), 2):
        version = f"v{attempt}"
        job = live(version)
        assert steps.killed_at(step, job)
        assert set(predictions_held(label_studio, number).values()) == {1}
        state = _job(backend, job).state
        # Either the queue starts the same run again, or another host puts the job back.
        if state == JobState.RUNNING and attempt % 2:
            _recover(backend, job)
        if state != JobState.DONE:
            steps.count(job)
        assert _job(backend, job).state == JobState.DONE
        expected += Counter((task, version) for task in tasks.values())
        assert predictions_held(label_studio, number) == expected


# Migrating


def _migrate(url: str) -> int:
    Database(url).migrate()
    return 0


def _at_schema(file: Path, revision: str) -> None:
    from alembic import command
    from alembic.config import Config

    import ml_backend.store as store

    database = Database(f"sqlite:///{file}")
    config = Config()
    config.set_main_option("script_location", str(Path(store.__path__[0]) / "migrations"))
    config.attributes["engine"] = database.engine
    command.upgrade(config, revision)
    with database.engine.begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO projects (key, label_studio_id, title, label_config, revision, "
            "trained_revision, created_at) VALUES ('1.5', 1, 'old', '', 3, 0, '2026-01-01')"
        )
    database.close()


def test_migration_killed_at_any_step_ends_when_started_again(tmp_path: Path) -> None:
    steps = Steps({}, _migrate)

    def old(name: str) -> str:
        _at_schema(tmp_path / name, "0001")
        return f"sqlite:///{tmp_path / name}"

    for older in ("0000a", "0000b", "0000c"):
        (tmp_path / f"whole.schema-{older}").touch()
    total = steps.count(old("whole"))
    copies = sorted(path.name for path in tmp_path.glob("whole.schema-*"))
    assert copies == [f"whole.schema-{schema}" for schema in ("0000b", "0000c", "0001")]
    assert (tmp_path / copies[-1]).stat().st_mode & 0o077 == 0
    for step in _spread(min(MIGRATING, total), total):
        url = old(f"killed-{step}")
        assert steps.killed_at(step, url)
        database = Database(url)
        database.migrate()
        with database.reading() as session:
            assert session.scalars(select(Project.title)).one() == "old"
        database.close()
        with closing(sqlite3.connect(tmp_path / f"killed-{step}.schema-0001")) as copy:
            assert copy.execute("SELECT title, revision FROM projects").fetchall() == [("old", 3)]
