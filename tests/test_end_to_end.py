"""The whole loop, with a real Label Studio and the server started as a user starts it.

The first tests follow one project. Each of their fixtures takes it one stage further, from
`connected` to `rolled_back`, so the tests of a stage stand before the fixture of the next one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests

from ml_backend.demo.label_studio_server import LabelStudioServer
from ml_backend.demo.project import LABEL_CONFIG, annotate, create_project, upload
from ml_backend.demo.shapes import SHAPES, ShapeImage, generate
from ml_backend.detection.evaluation import Evaluation, evaluate
from ml_backend.detection.types import Detections, Sample
from ml_backend.label_studio.label_config import parse_label_config
from tests.conftest import ROOT, MakeBackend, RunBackend, RunningBackend, ask, wait_for

ANNOTATED = 200
"""Images that the first training learns from, without pretrained weights."""
UNSEEN = 60
"""Images that measure: of 30, the AP50 varies by several points with the hold-out."""
STARRED = 40
WITHIN = 900
"""Seconds in which a training must end. A training stops after its preset's steps, not by time."""
# An average precision counts every box, so that those with a low score must be shown as well.
EVERY_BOX = LABEL_CONFIG.replace(
    "<RectangleLabels", '<RectangleLabels model_score_threshold="0.05"'
)
WITH_STAR = EVERY_BOX.replace(
    '<Label value="Triangle"/>', '<Label value="Triangle"/>\n    <Label value="Star"/>'
)


class Site:
    """Use a project in Label Studio as its pages do."""

    def __init__(
        self,
        server: LabelStudioServer,
        title: str,
        images: Sequence[ShapeImage],
        label_config: str = LABEL_CONFIG,
    ) -> None:
        self.server = server
        self.project, tasks = create_project(
            server, title, label_config, {i.name: i.encoded() for i in images}
        )
        self.images = {tasks[image.name]: image for image in images}

    def call(self, method: str, path: str, body: object = None, **params: str) -> Any:
        """Send a request to Label Studio's API; return its answer."""
        return ask(self.server, method, path, body, **params)

    def add(self, images: Sequence[ShapeImage]) -> list[int]:
        """Upload more images; return their tasks."""
        tasks = upload(self.server, self.project, {i.name: i.encoded() for i in images})
        added = {tasks[image.name]: image for image in images}
        self.images |= added
        return list(added)

    def annotate(self, tasks: Sequence[int]) -> None:
        """Annotate tasks with the boxes of the shapes on their images."""
        annotate(self.server, {task: self.images[task] for task in tasks})

    def open(self, task: int) -> list[dict[str, Any]]:
        """Open a task; return the predictions that are shown."""
        found = self.call("GET", f"/api/tasks/{task}/", project=str(self.project))
        predictions: list[dict[str, Any]] = found["predictions"]
        return predictions

    def retrieve(self, tasks: Sequence[int]) -> None:
        """Run the Data Manager's action "Retrieve predictions" on tasks."""
        self.call(
            "POST",
            "/api/dm/actions",
            {
                "selectedItems": {"all": False, "included": list(tasks)},
                "project": str(self.project),
            },
            id="retrieve_tasks_predictions",
            project=str(self.project),
        )

    def settings(self) -> dict[str, Any]:
        """Return the project's settings."""
        found: dict[str, Any] = self.call("GET", f"/api/projects/{self.project}/")
        return found

    def connection(self) -> dict[str, Any]:
        """Return the project's only connection to an ML backend."""
        (only,) = self.call("GET", "/api/ml/", project=str(self.project))
        assert isinstance(only, dict)
        return only

    def predicted(self, task: int, version: str) -> dict[str, Any]:
        """Open a task; return its only prediction of a version."""
        (prediction,) = [p for p in self.open(task) if p["model_version"] == version]
        return prediction

    def quality(self, tasks: Sequence[int], version: str) -> Evaluation:
        """Evaluate a version's predictions of tasks, as Label Studio holds them."""
        config = parse_label_config(self.settings()["label_config"])
        (control,) = config.controls
        found, truth = [], []
        for task in tasks:
            image = self.images[task]
            prediction = self.predicted(task, version)
            boxes = control.read_regions(prediction["result"]).regions
            scores = {r["id"]: r["score"] for r in prediction["result"]}
            size = np.array([*image.image.size] * 2, np.float32)
            found.append(
                Detections(
                    np.array([[b.x1, b.y1, b.x2, b.y2] for b in boxes], np.float32).reshape(-1, 4)
                    * size,
                    np.array([scores[b.region_id] for b in boxes], np.float32),
                    np.array([config.labels.index(b.label) for b in boxes], np.int64),
                )
            )
            labels = np.array([config.labels.index(name) for name in image.labels], np.int64)
            truth.append(Sample(str(task), Path(image.name), image.boxes, labels))
        return evaluate(found, truth, config.labels)


def of_label_studio(server: LabelStudioServer) -> dict[str, str]:
    """Return the backend's settings for a Label Studio."""
    return {"LABEL_STUDIO_URL": server.url, "LABEL_STUDIO_API_KEY": server.login.token}


def live(backend: RunningBackend) -> str | None:
    """Return the live version of the only project."""
    (project,) = backend.json("status")
    version: str | None = project["live_version"]
    return version


def trainings(backend: RunningBackend) -> list[dict[str, Any]]:
    """Return the newest trainings of the only project, newest first."""
    (project,) = backend.json("status")
    return [job for job in project["jobs"] if job["kind"] == "train"]


def wait_for_training(backend: RunningBackend, *, after: int) -> dict[str, Any]:
    """Wait until a training whose number is above `after` is done; fail if one fails."""

    def done() -> dict[str, Any] | None:
        for job in trainings(backend):
            assert job["state"] not in {"failed", "refused"}, f"{job}\n{backend.tail()}"
            if job["job"] > after and job["state"] == "done":
                return job
        return None

    try:
        # Each question starts a program, which takes time from the training.
        job: dict[str, Any] = wait_for(done, within=WITHIN, what="a training ends", every=3)
    except AssertionError:
        raise AssertionError(f"{trainings(backend)}\n{backend.tail()}") from None
    return job


def wait_for_autolabel(backend: RunningBackend, version: str) -> None:
    """Wait until auto-labelling with a version is done."""

    def labelled() -> bool:
        (project,) = backend.json("status")
        return any(
            (job["kind"], job["state"], job["version"]) == ("autolabel", "done", version)
            for job in project["jobs"]
        )

    wait_for(labelled, within=180, what=f"auto-labelling with {version} ends", every=2)


def shown_version(site: Site, task: int, version: str) -> bool:
    """Return whether an opened task shows a prediction of a version."""
    return any(p["model_version"] == version for p in site.open(task))


@dataclass(frozen=True)
class Connected:
    """A connected project.

    Attributes:
        site: the project in Label Studio.
        backend: the running backend.
        learned: tasks that are annotated for the first training.
        unseen: tasks that nobody annotates.
    """

    site: Site
    backend: RunningBackend
    learned: list[int]
    unseen: list[int]


@dataclass(frozen=True)
class Trained:
    """A training that is done.

    Attributes:
        job: number of the training.
        version: the version that it made.
        unseen: tasks with the project's labels that the version has not learned from.
    """

    job: int
    version: str
    unseen: list[int]


@pytest.fixture(scope="module")
def connected(
    label_studio: LabelStudioServer,
    run_backend: RunBackend,
    tmp_path_factory: pytest.TempPathFactory,
) -> Connected:
    """Connect a project twice."""
    images = generate(ANNOTATED + UNSEEN, seed=1, width=128, height=96, most=3)
    site = Site(label_studio, "The whole loop", images, EVERY_BOX)
    tasks = list(site.images)
    settings = {
        **of_label_studio(label_studio),
        "PYTHONPATH": str(ROOT),
        "ML_BACKEND_PRESET": "tests.quick:LEARNING",
        "ML_BACKEND_TRAIN_MIN": str(ANNOTATED),
        "ML_BACKEND_TRAIN_EVERY": "20",
        "ML_BACKEND_TRAIN_GROWTH": "0",
        "ML_BACKEND_TRAIN_DELAY": "2",
        "ML_BACKEND_TRAIN_THREADS": "1",
    }
    backend = run_backend(RunningBackend(tmp_path_factory.mktemp("loop"), **settings))
    backend.command("connect", "--project", str(site.project), "--url", backend.url)
    backend.command("connect", "--project", str(site.project), "--url", backend.url)
    return Connected(site, backend, tasks[:ANNOTATED], tasks[ANNOTATED:])


def test_connect_twice_leaves_one_connection_and_one_webhook(connected: Connected) -> None:
    assert connected.site.connection()["title"] == "untrained"
    hooks = connected.site.call("GET", "/api/webhooks/", project=str(connected.site.project))
    assert [hook["url"] for hook in hooks] == [f"{connected.backend.url}/webhook"]


def test_doctor_connected_project_finds_nothing_wrong(connected: Connected) -> None:
    found = connected.backend.json("doctor", "--project", str(connected.site.project))
    findings = {f["what"]: f for f in found}
    assert {f["status"] for f in findings.values()} == {"ok"}, findings
    assert "an upload" in findings["image"]["detail"]


def test_open_task_untrained_project_shows_no_boxes(connected: Connected) -> None:
    assert all(not p["result"] for p in connected.site.open(connected.unseen[0]))


@pytest.fixture(scope="module")
def nearly_annotated(connected: Connected) -> Connected:
    """Annotate all but one of the tasks that a first training needs."""
    connected.site.annotate(connected.learned[:-1])
    return connected


def test_training_one_annotation_short_waits_with_a_reason(nearly_annotated: Connected) -> None:
    backend = nearly_annotated.backend
    (job,) = wait_for(lambda: trainings(backend), within=20, what="a job that waits")
    assert job["state"] == "waiting"
    assert "waiting for" in job["reason"]


@pytest.fixture(scope="module")
def first(nearly_annotated: Connected) -> Trained:
    """Annotate the last task; wait for the training and for auto-labelling."""
    site, backend = nearly_annotated.site, nearly_annotated.backend
    site.annotate(nearly_annotated.learned[-1:])
    job = wait_for_training(backend, after=0)
    wait_for_autolabel(backend, job["version"])
    return Trained(job["job"], job["version"], nearly_annotated.unseen)


def test_training_enough_annotations_starts_by_itself_and_its_version_goes_live(
    connected: Connected, first: Trained
) -> None:
    site, backend = connected.site, connected.backend
    versions = backend.json("versions", "--project", str(site.project))
    assert live(backend) == first.version, versions
    wait_for(
        lambda: site.connection()["title"] == first.version, within=20, what="the title follows"
    )
    assert site.settings()["model_version"] == first.version
    assert shown_version(site, first.unseen[0], first.version)


def test_predictions_unseen_images_are_right(connected: Connected, first: Trained) -> None:
    connected.site.retrieve(first.unseen)
    quality = connected.site.quality(first.unseen, first.version)
    assert quality.map50 > 0.8, quality


def test_retrieve_predictions_twice_doubles_none(connected: Connected, first: Trained) -> None:
    connected.site.retrieve(first.unseen)
    connected.site.retrieve(first.unseen)
    for task in first.unseen:
        shown = [p["model_version"] for p in connected.site.open(task)]
        assert shown.count(first.version) == 1


def test_next_task_is_the_one_with_the_lowest_acquisition_score(
    connected: Connected, first: Trained
) -> None:
    site = connected.site
    scores = {task: site.predicted(task, first.version)["score"] for task in first.unseen}
    following = site.call("GET", f"/api/projects/{site.project}/next/")
    assert following["id"] == min(first.unseen, key=lambda task: scores[task])


@pytest.fixture(scope="module")
def second(connected: Connected, first: Trained) -> Trained:
    """Add a label and annotate images with it; wait for the training and for auto-labelling."""
    site, backend = connected.site, connected.backend
    site.call("PATCH", f"/api/projects/{site.project}/", {"label_config": WITH_STAR})
    images = generate(STARRED + 15, seed=2, shapes=SHAPES, width=128, height=96, most=3)
    starred = site.add(images)
    site.annotate(starred[:STARRED])
    job = wait_for_training(backend, after=first.job)
    wait_for_autolabel(backend, job["version"])
    return Trained(job["job"], job["version"], starred[STARRED:])


def test_training_added_label_is_learned_and_the_others_are_kept(
    connected: Connected, second: Trained
) -> None:
    site, backend = connected.site, connected.backend
    found = backend.json("versions", "--project", str(site.project))
    versions = {v["version"]: v for v in found}
    assert versions[second.version]["card"]["labels"] == list(SHAPES)
    assert live(backend) == second.version, versions[second.version]["reason"]
    wait_for(
        lambda: site.connection()["title"] == second.version, within=20, what="the title follows"
    )
    site.retrieve(second.unseen)
    quality = site.quality(second.unseen, second.version)
    assert (quality.per_class["Star"].ap50 or 0.0) > 0.5, quality
    assert quality.map50 > 0.65, quality


@pytest.fixture(scope="module")
def rolled_back(connected: Connected, second: Trained) -> str:
    """Roll the second version back; return it."""
    connected.backend.command("rollback", "--project", str(connected.site.project))
    return second.version


def test_rollback_version_before_is_live_and_predicts(
    connected: Connected, first: Trained, rolled_back: str
) -> None:
    site, backend = connected.site, connected.backend
    assert live(backend) == first.version
    wait_for(
        lambda: site.connection()["title"] == first.version, within=20, what="the title follows"
    )
    body = {
        "tasks": [site.call("GET", f"/api/tasks/{first.unseen[0]}/")],
        "project": backend.json("status")[0]["project"],
        "label_config": WITH_STAR,
    }
    wait_for(
        lambda: backend.post("/predict", body).json()["model_version"] == first.version,
        within=20,
        what="the earlier version predicts",
    )


def test_restart_after_rollback_keeps_the_live_version(
    connected: Connected, first: Trained, rolled_back: str
) -> None:
    connected.backend.stop()
    connected.backend.start()
    assert live(connected.backend) == first.version


def test_training_killed_is_tried_again_while_the_server_answers(
    connected: Connected, rolled_back: str
) -> None:
    site, backend = connected.site, connected.backend
    backend.stop()
    backend.settings["ML_BACKEND_TRAIN_BUDGET"] = "20"
    backend.start()
    asked = backend.json("train", "--project", str(site.project))
    (process,) = wait_for(lambda: backend.job_processes("train"), within=60, what="a training runs")
    process.kill()
    assert backend.get("/health").ok
    assert wait_for(
        lambda: "attempt 2" in trainings(backend)[0]["reason"] or backend.job_processes("train"),
        within=60,
        what="the job is tried again",
    )
    ended = wait_for_training(backend, after=asked["job"] - 1)
    assert ended["job"] == asked["job"]
    # Every version is kept, one is live, and a version that was rolled back is not promoted again.
    found = backend.json("versions", "--project", str(site.project))
    states = {v["version"]: v["state"] for v in found}
    assert states[rolled_back] == "rolled back"
    assert list(states.values()).count("live") == 1


def test_basic_authentication_and_webhook_secret_connected_project_trains_and_predicts(
    label_studio: LabelStudioServer, make_backend: MakeBackend
) -> None:
    site = Site(label_studio, "Locked", generate(14, seed=3))
    tasks = list(site.images)
    backend = make_backend(
        **of_label_studio(label_studio),
        PYTHONPATH=str(ROOT),
        BASIC_AUTH_USER="annotators",
        BASIC_AUTH_PASS="pa:ss wörd",
        ML_BACKEND_WEBHOOK_SECRET="open sesame",
        ML_BACKEND_PRESET="tests.quick:PRESET",
        ML_BACKEND_TRAIN_MIN="12",
        ML_BACKEND_TRAIN_DELAY="1",
        ML_BACKEND_TRAIN_THREADS="1",
    )
    assert requests.get(f"{backend.url}/health", timeout=10).ok
    assert requests.get(f"{backend.url}/versions", timeout=10).status_code == 401
    assert requests.post(f"{backend.url}/webhook", json={}, timeout=10).status_code == 401

    backend.command("connect", "--project", str(site.project), "--url", backend.url)
    findings = backend.json("doctor", "--project", str(site.project))
    assert {f["status"] for f in findings} == {"ok"}, findings

    site.annotate(tasks[:12])
    version = wait_for_training(backend, after=0)["version"]
    if live(backend) is None:
        # So few steps may find nothing, which is not promoted by itself.
        backend.command("promote", version, "--project", str(site.project))
    wait_for(lambda: site.connection()["title"] == version, within=20, what="the title follows")
    wait_for(lambda: shown_version(site, tasks[-1], version), within=20, what="a prediction")

    # A webhook that lost the secret is found, and `connect` repairs it.
    (hook,) = site.call("GET", "/api/webhooks/", project=str(site.project))
    site.call("PATCH", f"/api/webhooks/{hook['id']}/", {"headers": {}})
    findings = backend.json("doctor", "--project", str(site.project), status=1)
    assert [f["what"] for f in findings if f["status"] == "error"] == ["webhook"]
    backend.command("connect", "--project", str(site.project), "--url", backend.url)
    backend.command("doctor", "--project", str(site.project))


def test_training_after_changes_while_the_backend_was_down_reads_them_back(
    label_studio: LabelStudioServer, make_backend: MakeBackend
) -> None:
    site = Site(label_studio, "Away", generate(8, seed=4))
    tasks = list(site.images)
    backend = make_backend(
        **of_label_studio(label_studio),
        PYTHONPATH=str(ROOT),
        ML_BACKEND_PRESET="tests.quick:PRESET",
        ML_BACKEND_TRAIN_MIN="100",
        ML_BACKEND_TRAIN_THREADS="1",
    )
    backend.command("connect", "--project", str(site.project), "--url", backend.url)
    site.annotate(tasks[:4])
    backend.kill()
    wait_for(lambda: not _answers(backend), within=20, what="both of its processes are gone")
    # No webhook of these arrives: new annotations, a changed one, a deleted one, a deleted task.
    site.annotate(tasks[4:6])
    annotations = {
        task: site.call("GET", f"/api/tasks/{task}/annotations/")[0]["id"] for task in tasks[:4]
    }
    site.call("PATCH", f"/api/annotations/{annotations[tasks[0]]}/", {"result": []})
    site.call("DELETE", f"/api/annotations/{annotations[tasks[1]]}/")
    site.call("DELETE", f"/api/tasks/{tasks[2]}/")
    skipped = {"result": [], "was_cancelled": True}
    site.call("POST", f"/api/tasks/{tasks[6]}/annotations/", skipped)

    backend.start()
    backend.command("train", "--project", str(site.project), "--wait")
    (version,) = backend.json("versions", "--project", str(site.project))
    data = version["card"]["data"]
    # Tasks 0 (empty now), 3, 4 and 5 are left.
    assert data["tasks"] == 4
    expected = sum(len(site.images[task].labels) for task in tasks[3:6])
    assert sum(data["boxes"].values()) == expected
    assert data["negatives"] >= 1


def _answers(backend: RunningBackend) -> bool:
    try:
        return requests.get(f"{backend.url}/health", timeout=1).ok
    except requests.RequestException:
        return False
