"""Trainings from stored annotations to their end, in a process under the supervisor."""

from __future__ import annotations

import base64
import io
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from sqlalchemy import update
from torch import nn

from ml_backend.backend import Backend
from ml_backend.demo.shapes import SHAPES, generate
from ml_backend.detection.architectures.fcos import fcos_shufflenet
from ml_backend.detection.architectures.torchvision import TorchvisionDetector
from ml_backend.detection.decoding import decode_image
from ml_backend.detection.presets.tiny import PRESET as TINY
from ml_backend.label_studio.events import AnnotationInfo, AnnotationsChanged, ProjectInfo, TaskInfo
from ml_backend.label_studio.label_config import parse_label_config
from ml_backend.reasons import Code, Reason, reason
from ml_backend.settings import load_settings
from ml_backend.store.database import Database
from ml_backend.store.states import JobKind, JobState, Trigger
from ml_backend.store.tables import Job, Project
from ml_backend.training.dataset import build_dataset
from ml_backend.wording import words
from ml_backend.worker.supervisor import PROGRAM, supervise
from tests.conftest import ROOT

MOMENT = datetime(2026, 1, 1, tzinfo=UTC)
PICTURES = generate(12, seed=0, width=128, height=96, most=2)
CONFIG = f"""<View><Image name="image" value="$camera/left"/>
<RectangleLabels name="box" toName="image">
{"".join(f'<Label value="{name}"/>' for name in SHAPES[:3])}</RectangleLabels></View>"""
TWO_IMAGES = CONFIG.replace(
    "</View>",
    """<Image name="second" value="$other"/><RectangleLabels name="boxes" toName="second">
<Label value="Circle"/></RectangleLabels></View>""",
)
PROJECT = ProjectInfo("7.1795463889", 7, "shapes", CONFIG, None, None)
SHORT = replace(TINY, name="short", min_size=64, max_size=96, batch_size=2, steps=2, epochs=0)


class _Diverging(nn.Module):
    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.inner = fcos_shufflenet(outputs)

    def forward(self, images: list[torch.Tensor], targets: Any = None) -> Any:
        losses = self.inner(images, targets)
        return {k: v * float("nan") for k, v in losses.items()} if self.training else losses


DIVERGING = replace(SHORT, architecture=TorchvisionDetector(_Diverging))


def _build_while_another_takes_the_job(outputs: int) -> nn.Module:
    database = Database(load_settings().database)
    with database.session() as session:
        session.execute(update(Job).values(claim="of another run"))
    return fcos_shufflenet(outputs)


TAKEN_OVER = replace(SHORT, architecture=TorchvisionDetector(_build_while_another_takes_the_job))


def _annotated(
    chosen: Mapping[str, str], *, readable: int = 12, config: str = CONFIG, enlarged: int = 1
) -> tuple[Backend, Project]:
    """Make a backend with a project of annotated tasks.

    Args:
        chosen: settings, by their environment names.
        readable: tasks from the first on whose image can be read.
        config: label config.
        enlarged: factor by which the sides of the images are enlarged.
    """
    known = replace(PROJECT, label_config=config)
    backend = Backend(load_settings(chosen))
    project = backend.ingest.introduce(PROJECT.key, 7, label_config=config)
    for number, image in enumerate(PICTURES, 1):
        content = image.encoded()
        if enlarged > 1:
            large = io.BytesIO()
            image.image.resize((128 * enlarged, 96 * enlarged)).save(large, "JPEG")
            content = large.getvalue()
        address = "data:image/jpeg;base64," + base64.b64encode(content).decode()
        if number > readable:
            address = "data:image/jpeg;base64,"
        regions = [
            {
                "type": "rectanglelabels",
                "from_name": "box",
                "to_name": "image",
                "original_width": 128,
                "original_height": 96,
                "value": {
                    "x": float(x1) / 1.28,
                    "y": float(y1) / 0.96,
                    "width": float(x2 - x1) / 1.28,
                    "height": float(y2 - y1) / 0.96,
                    "rectanglelabels": [label],
                },
            }
            for (x1, y1, x2, y2), label in zip(image.boxes, image.labels, strict=True)
        ]
        annotation = AnnotationInfo(
            number, number, regions, False, False, None, None, 1, MOMENT, MOMENT
        )
        task = TaskInfo(number, {"camera/left": address, "other": address}, MOMENT)
        backend.ingest.apply(AnnotationsChanged(known, (annotation,), (task,)), known)
    return backend, project


Train = Callable[..., Job]


@pytest.fixture
def train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Train:
    """Return a function that does a training in a process; it returns the job after that."""

    def run(settings: Mapping[str, str] | None = None, **project: Any) -> Job:
        backend, claimed = _claimed(tmp_path, monkeypatch, settings, **project)
        _supervise(backend, claimed)
        said = capfd.readouterr().err
        assert "Traceback" not in said, said
        return _job(backend, claimed)

    return run


def _claimed(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: Mapping[str, str] | None = None,
    **project: Any,
) -> tuple[Backend, Job]:
    """Set the environment of a job's process, and claim a training of an annotated project."""
    chosen = {
        "MODEL_DIR": str(folder),
        "ML_BACKEND_PRESET": "tests.test_training_run:SHORT",
        "ML_BACKEND_WEIGHTS": "none",
        "ML_BACKEND_DEVICE": "cpu",
        "ML_BACKEND_TRAIN_THREADS": "1",
        **(settings or {}),
    }
    for name, value in {**chosen, "PYTHONPATH": str(ROOT)}.items():
        monkeypatch.setenv(name, value)
    backend, known = _annotated(chosen, **project)
    asked = backend.requests.training(known.id, trigger=Trigger.BUTTON, forced=True)
    job = backend.jobs.get(asked.job)
    assert job is not None
    claimed = backend.jobs.claim(job.id, job.run, "here")
    assert claimed is not None
    return backend, claimed


def _supervise(backend: Backend, claimed: Job) -> None:
    """Do a claimed job in a process of its own, to its end."""
    supervise(
        backend.job_run(claimed, threading.Event()),
        backend.settings,
        threading.Event(),
        prepared={},
    )


def _job(backend: Backend, claimed: Job) -> Job:
    job = backend.jobs.get(claimed.id)
    backend.database.close()
    assert job is not None
    return job


def test_training_data_key_with_a_slash_ends_done(train: Train) -> None:
    job = train()
    assert job.state == JobState.DONE, job.reason
    assert job.version is not None
    assert "short-12tasks" in job.version


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("ML_BACKEND_PRESET", "foo:bar"),
        ("ML_BACKEND_WEIGHTS", "/etc/hostname"),
        ("ML_BACKEND_DEVICE", "cuda:99"),
    ],
)
def test_training_wrong_setting_is_refused_with_its_name(
    train: Train, setting: str, value: str
) -> None:
    job = train({setting: value})
    assert job.state == JobState.REFUSED
    said = words(job.reason)
    assert said.startswith("refused because of a setting: ")
    assert setting in said


def test_training_loss_of_nan_fails_with_a_remedy(train: Train) -> None:
    job = train({"ML_BACKEND_PRESET": "tests.test_training_run:DIVERGING"})
    assert job.state == JobState.FAILED
    said = words(job.reason)
    assert said.startswith("failed: the loss became nan after 0 steps: a smaller learning")


def test_training_taken_over_by_another_run_ends_and_leaves_the_job(
    train: Train, tmp_path: Path
) -> None:
    job = train({"ML_BACKEND_PRESET": "tests.test_training_run:TAKEN_OVER"})
    assert (job.state, job.claim, job.version) == (JobState.RUNNING, "of another run", None)
    assert list(tmp_path.glob("projects/*/*")) == []


def test_training_dead_worker_ends_before_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, claimed = _claimed(tmp_path, monkeypatch)
    gone = subprocess.run(["sh", "-c", "echo $$"], capture_output=True, text=True).stdout.strip()
    ours, theirs = os.pipe()
    program = [sys.executable, "-m", PROGRAM, "train", str(claimed.id), str(claimed.claim)]
    done = subprocess.run(
        [*program, gone, str(theirs), "{}"],
        pass_fds=[theirs],
        capture_output=True,
        text=True,
        timeout=300,
    )
    os.close(theirs)
    with os.fdopen(ours, "rb") as reports:
        assert reports.read() == b""
    assert "Traceback" not in done.stderr, done.stderr
    job = _job(backend, claimed)
    assert (done.returncode, job.state, job.progress) == (1, JobState.RUNNING, 0)
    assert list(tmp_path.glob("projects/*/*")) == []


def test_training_images_of_one_task_are_refused(train: Train) -> None:
    job = train(readable=1, config=TWO_IMAGES)
    assert job.state == JobState.REFUSED
    assert words(job.reason).startswith("refused because all images are one task's")


def test_build_dataset_large_images_become_small_copies_with_boxes_of_the_originals(
    tmp_path: Path,
) -> None:
    backend, project = _annotated({"MODEL_DIR": str(tmp_path)}, enlarged=8)
    told: list[Reason] = []
    decided: list[dict[str, Any]] = []
    copies = tmp_path / "copies"
    copies.mkdir()
    dataset = build_dataset(
        project,
        parse_label_config(CONFIG),
        backend.database,
        backend.label_studios.images(project),
        copies,
        max_pixels=10**6,
        longest_side=192,
        random_share=0.1,
        store_sides=decided.extend,
        on_progress=lambda fraction, why: told.append(why),
    )
    backend.database.close()
    assert len(dataset.samples) == 12
    for sample, picture in zip(dataset.samples, PICTURES, strict=True):
        assert sample.size == (1024, 768)
        assert decode_image(sample.image).size == (256, 192)
        assert sample.boxes == pytest.approx(8 * picture.boxes, abs=0.1)
    assert [words(why) for why in told] == ["reading images: 10 of 12"]
    assert [row["task"] for row in decided] == list(range(1, 13))


def test_live_head_after_a_training_went_live_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, training = _claimed(tmp_path, monkeypatch)
    _supervise(backend, training)
    trained = backend.jobs.get(training.id)
    assert trained is not None
    assert trained.version is not None
    backend.versions.promote(training.project_id, trained.version)
    with backend.database.session() as session:
        job = Job(
            project_id=training.project_id,
            kind=JobKind.LIVE_HEAD,
            state=JobState.QUEUED,
            trigger=Trigger.WEBHOOK,
            reason=reason(Code.ANNOTATIONS_CHANGED, annotated=12),
        )
        session.add(job)
        session.flush()
        backend.queue.put(session, job)
    claimed = backend.jobs.claim(job.id, job.run, "here")
    assert claimed is not None
    _supervise(backend, claimed)
    ended = _job(backend, claimed)
    assert (ended.state, ended.reason) == (JobState.REFUSED, reason(Code.TRAINED_IS_LIVE))
