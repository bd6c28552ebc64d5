"""The whole loop, with a real Label Studio and the server started as a user starts it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import requests

from ml_backend.demo.label_studio_server import LabelStudioServer
from ml_backend.demo.project import LABEL_CONFIG, annotate, create_project, upload
from ml_backend.demo.shapes import SHAPES, ShapeImage, generate
from ml_backend.detection.evaluation import Evaluation, evaluate
from ml_backend.detection.types import Detections, Sample
from ml_backend.label_studio.label_config import parse_label_config
from tests.conftest import MakeBackend, RunningBackend, ask, wait_for

ANNOTATED = 120
"""Images that the first training learns from; no pretrained weights help it."""
UNSEEN = 30
STARRED = 40
BUDGET = 280
"""Seconds for each training."""
# Every box is shown, unsure ones as well: an average precision counts them all.
EVERY_BOX = LABEL_CONFIG.replace(
    "<RectangleLabels", '<RectangleLabels model_score_threshold="0.05"'
)
WITH_STAR = EVERY_BOX.replace(
    '<Label value="Triangle"/>', '<Label value="Triangle"/>\n    <Label value="Star"/>'
)


class Site:
    """A project in Label Studio, as its pages use it."""

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
        """One request to Label Studio's API."""
        return ask(self.server, method, path, body, **params)

    def add(self, images: Sequence[ShapeImage]) -> list[int]:
        """Uploads more images; answers their tasks."""
        tasks = upload(self.server, self.project, {i.name: i.encoded() for i in images})
        added = {tasks[image.name]: image for image in images}
        self.images |= added
        return list(added)

    def annotate(self, tasks: Sequence[int]) -> None:
        """Draws the boxes of tasks, as a person would."""
        annotate(self.server, {task: self.images[task] for task in tasks})

    def open(self, task: int) -> list[dict[str, Any]]:
        """Opens a task; answers the predictions that are shown."""
        found = self.call("GET", f"/api/tasks/{task}/", project=str(self.project))
        predictions: list[dict[str, Any]] = found["predictions"]
        return predictions

    def retrieve(self, tasks: Sequence[int]) -> None:
        """What the Data Manager's "Retrieve predictions" does on a selection."""
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
        """The project."""
        found: dict[str, Any] = self.call("GET", f"/api/projects/{self.project}/")
        return found

    def connection(self) -> dict[str, Any]:
        """The one connection to an ML backend."""
        (only,) = self.call("GET", "/api/ml/", project=str(self.project))
        assert isinstance(only, dict)
        return only

    def predicted(self, task: int, version: str) -> dict[str, Any]:
        """Opens a task; answers its only prediction of a version."""
        (prediction,) = [p for p in self.open(task) if p["model_version"] == version]
        return prediction

    def quality(self, tasks: Sequence[int], version: str) -> Evaluation:
        """How right the predictions are that Label Studio holds of a version."""
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
    """The settings that lead to it."""
    return {"LABEL_STUDIO_URL": server.url, "LABEL_STUDIO_API_KEY": server.login.token}


def live(backend: RunningBackend) -> str | None:
    """The live version."""
    (project,) = backend.json("status")
    version: str | None = project["live_version"]
    return version


def trainings(backend: RunningBackend) -> list[dict[str, Any]]:
    """The newest jobs, newest first."""
    (project,) = backend.json("status")
    return [job for job in project["jobs"] if job["kind"] == "train"]


def a_training_ends(backend: RunningBackend, *, after: int, within: float) -> dict[str, Any]:
    """Waits for a training job beyond job number `after` to end well."""

    def ended() -> dict[str, Any] | None:
        for job in trainings(backend):
            assert job["state"] not in {"failed", "refused"}, f"{job}\n{backend.tail()}"
            if job["job"] > after and job["state"] == "done":
                return job
        return None

    try:
        # Seldom, because asking takes time from the training, which gives way to everything.
        job: dict[str, Any] = wait_for(ended, within=within, what="a training ends", every=10)
    except AssertionError:
        raise AssertionError(f"{trainings(backend)}\n{backend.tail()}") from None
    return job


def the_rest_is_labelled(backend: RunningBackend, version: str) -> None:
    """Waits until every task without an annotation has its prediction of a version."""

    def labelled() -> bool:
        (project,) = backend.json("status")
        return any(
            (job["kind"], job["state"], job["version"]) == ("autolabel", "done", version)
            for job in project["jobs"]
        )

    wait_for(labelled, within=180, what=f"the rest is labelled by {version}", every=2)


def training_processes(backend: RunningBackend) -> list[psutil.Process]:
    """The processes that train for a backend."""
    return [
        child
        for child in psutil.Process(backend.pid).children(recursive=True)
        if "ml_backend.programs.train" in child.cmdline()
    ]


def shown_version(site: Site, task: int, version: str) -> bool:
    """Whether an opened task shows a prediction of a version."""
    return any(p["model_version"] == version for p in site.open(task))


@pytest.mark.alone
def test_a_project_learns_a_label_is_added_and_a_version_is_taken_back(
    label_studio: LabelStudioServer, make_backend: MakeBackend
) -> None:
    site = Site(label_studio, "The whole loop", generate(ANNOTATED + UNSEEN, seed=1), EVERY_BOX)
    tasks = list(site.images)
    learned, unseen = tasks[:ANNOTATED], tasks[ANNOTATED:]
    backend = make_backend(
        **of_label_studio(label_studio),
        ML_BACKEND_TRAIN_MIN=str(ANNOTATED),
        ML_BACKEND_TRAIN_EVERY="20",
        ML_BACKEND_TRAIN_DELAY="2",
        ML_BACKEND_TRAIN_BUDGET=str(BUDGET),
        ML_BACKEND_TRAIN_THREADS="2",
    )

    # Connected, checked, and connected again without doubling anything.
    backend.command("connect", "--project", str(site.project), "--url", backend.url)
    backend.command("connect", "--project", str(site.project), "--url", backend.url)
    assert site.connection()["title"] == "untrained"
    hooks = site.call("GET", "/api/webhooks/", project=str(site.project))
    assert [hook["url"] for hook in hooks] == [f"{backend.url}/webhook"]
    findings = {f["what"]: f for f in backend.json("doctor", "--project", str(site.project))}
    assert {f["status"] for f in findings.values()} == {"ok"}, findings
    assert "an upload" in findings["image"]["detail"]

    # Untrained: a task opens without boxes, and without an error.
    assert all(not p["result"] for p in site.open(unseen[0]))

    # People annotate; nobody starts a training.
    site.annotate(learned[:-1])
    (job,) = wait_for(lambda: trainings(backend), within=20, what="a job that waits")
    assert job["state"] == "waiting"
    assert "waiting for" in job["reason"]
    site.annotate(learned[-1:])
    first = a_training_ends(backend, after=0, within=BUDGET + 120)
    version = first["version"]
    assert live(backend) == version, backend.json("versions", "--project", str(site.project))

    # Label Studio follows: title and version are the same, an opened task shows boxes.
    wait_for(lambda: site.connection()["title"] == version, within=20, what="the title follows")
    assert site.settings()["model_version"] == version
    the_rest_is_labelled(backend, version)
    assert shown_version(site, unseen[0], version)
    site.retrieve(unseen)
    quality = site.quality(unseen, version)
    assert quality.map50 > 0.8, quality
    # Asked again, nothing is doubled: `quality` wants exactly one of the version for each task.
    site.retrieve(unseen)
    site.quality(unseen, version)

    # The next task is the one with the lowest acquisition score.
    scores = {task: site.predicted(task, version)["score"] for task in unseen}
    following = site.call("GET", f"/api/projects/{site.project}/next/")
    assert following["id"] == min(unseen, key=lambda task: scores[task])

    # A label is added, and learned; the others are not forgotten.
    site.call("PATCH", f"/api/projects/{site.project}/", {"label_config": WITH_STAR})
    starred = site.add(generate(STARRED + 15, seed=2, shapes=SHAPES))
    site.annotate(starred[:STARRED])
    second = a_training_ends(backend, after=first["job"], within=BUDGET + 120)
    newer = second["version"]
    versions = {v["version"]: v for v in backend.json("versions", "--project", str(site.project))}
    assert versions[newer]["card"]["labels"] == list(SHAPES)
    assert live(backend) == newer, versions[newer]["reason"]
    wait_for(lambda: site.connection()["title"] == newer, within=20, what="the title follows")
    the_rest_is_labelled(backend, newer)
    site.retrieve(starred[STARRED:])
    with_star = site.quality(starred[STARRED:], newer)
    assert (with_star.per_class["Star"].ap50 or 0.0) > 0.5, with_star
    assert with_star.map50 > 0.65, with_star

    # Rolled back at once, and Label Studio follows again.
    backend.command("rollback", "--project", str(site.project))
    assert live(backend) == version
    wait_for(lambda: site.connection()["title"] == version, within=20, what="the title follows")
    wait_for(
        lambda: (
            backend.post(
                "/predict",
                {
                    "tasks": [site.call("GET", f"/api/tasks/{unseen[0]}/")],
                    "project": backend.json("status")[0]["project"],
                    "label_config": WITH_STAR,
                },
            ).json()["model_version"]
            == version
        ),
        within=20,
        what="the earlier version predicts",
    )

    # So it stays after a restart.
    backend.stop()
    backend.settings["ML_BACKEND_TRAIN_BUDGET"] = "20"
    backend.start()
    assert live(backend) == version

    # kill -9 of a training: serving goes on, the job is tried again and ends.
    asked = backend.json("train", "--project", str(site.project))
    (process,) = wait_for(lambda: training_processes(backend), within=60, what="a training runs")
    process.kill()
    assert backend.get("/health").ok
    tried = wait_for(
        lambda: "attempt 2" in trainings(backend)[0]["reason"] or training_processes(backend),
        within=60,
        what="the job is tried again",
    )
    assert tried
    third = a_training_ends(backend, after=asked["job"] - 1, within=BUDGET + 120)
    assert third["job"] == asked["job"]
    # Nothing is lost, one version is live, and what was rolled back is not promoted again.
    states = {
        v["version"]: v["state"] for v in backend.json("versions", "--project", str(site.project))
    }
    assert states[newer] == "rolled back"
    assert list(states.values()).count("live") == 1


def test_with_basic_authentication_and_a_webhook_secret(
    label_studio: LabelStudioServer, make_backend: MakeBackend
) -> None:
    site = Site(label_studio, "Locked", generate(14, seed=3))
    tasks = list(site.images)
    backend = make_backend(
        **of_label_studio(label_studio),
        BASIC_AUTH_USER="annotators",
        BASIC_AUTH_PASS="pa:ss wörd",
        ML_BACKEND_WEBHOOK_SECRET="open sesame",
        ML_BACKEND_TRAIN_MIN="12",
        ML_BACKEND_TRAIN_DELAY="1",
        ML_BACKEND_TRAIN_BUDGET="40",
        ML_BACKEND_TRAIN_THREADS="2",
    )
    assert requests.get(f"{backend.url}/health", timeout=10).ok
    assert requests.get(f"{backend.url}/versions", timeout=10).status_code == 401
    assert requests.post(f"{backend.url}/webhook", json={}, timeout=10).status_code == 401

    backend.command("connect", "--project", str(site.project), "--url", backend.url)
    findings = backend.json("doctor", "--project", str(site.project))
    assert {f["status"] for f in findings} == {"ok"}, findings

    site.annotate(tasks[:12])
    job = a_training_ends(backend, after=0, within=200)
    version = job["version"]
    if live(backend) is None:
        # So little was learned that it did not go live by itself: an admin may say so.
        backend.command("promote", version, "--project", str(site.project))
    wait_for(lambda: site.connection()["title"] == version, within=20, what="the title follows")
    wait_for(lambda: shown_version(site, tasks[-1], version), within=20, what="a prediction")

    # A webhook that lost the secret is noticed, and put right.
    (hook,) = site.call("GET", "/api/webhooks/", project=str(site.project))
    site.call("PATCH", f"/api/webhooks/{hook['id']}/", {"headers": {}})
    findings = backend.json("doctor", "--project", str(site.project), status=1)
    assert [f["what"] for f in findings if f["status"] == "error"] == ["webhook"]
    backend.command("connect", "--project", str(site.project), "--url", backend.url)
    backend.command("doctor", "--project", str(site.project))


def test_what_happened_while_the_backend_was_away_is_read_back(
    label_studio: LabelStudioServer, make_backend: MakeBackend
) -> None:
    site = Site(label_studio, "Away", generate(8, seed=4))
    tasks = list(site.images)
    backend = make_backend(
        **of_label_studio(label_studio),
        ML_BACKEND_TRAIN_MIN="100",
        ML_BACKEND_TRAIN_BUDGET="6",
        ML_BACKEND_TRAIN_THREADS="2",
    )
    backend.command("connect", "--project", str(site.project), "--url", backend.url)
    site.annotate(tasks[:4])
    backend.kill()
    wait_for(lambda: not _answers(backend), within=20, what="both of its processes are gone")
    # Heard by nobody: new annotations, a changed one, a deleted one, a deleted task.
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
    # Left: tasks 0 (empty now), 3, 4 and 5.
    assert data["tasks"] == 4
    expected = sum(len(site.images[task].labels) for task in tasks[3:6])
    assert sum(data["boxes"].values()) == expected
    assert data["negatives"] >= 1


def _answers(backend: RunningBackend) -> bool:
    try:
        return requests.get(f"{backend.url}/health", timeout=1).ok
    except requests.RequestException:
        return False
