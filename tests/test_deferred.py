"""Tasks that a request for predictions did not finish are predicted once, by a job."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.models.detection import FasterRCNN_MobileNet_V3_Large_320_FPN_Weights

from ml_backend.backend import Backend
from ml_backend.demo.label_studio_server import LabelStudioServer
from ml_backend.demo.project import LABEL_CONFIG, create_project
from ml_backend.demo.shapes import SHAPES, generate
from ml_backend.detection.detector import Detector
from ml_backend.detection.presets import preset_named
from ml_backend.detection.presets.small import PRESET as SMALL
from ml_backend.label_studio.client import LabelStudioClient
from ml_backend.settings import load_settings
from ml_backend.store.states import JobState
from ml_backend.store.tables import Job
from ml_backend.wording import words
from tests.conftest import RunningBackend, make_live, predictions_by_task, wait_for

TRUCKS = LABEL_CONFIG.replace('<Label value="Circle"/>', '<Label value="truck"/>')


class Site:
    """Use a project in Label Studio, and a backend that may run or not."""

    def __init__(
        self,
        server: LabelStudioServer,
        running: RunningBackend,
        count: int,
        label_config: str = LABEL_CONFIG,
    ) -> None:
        self.server = server
        self.running = running
        images = {i.name: i.encoded() for i in generate(count, seed=41, width=128, height=96)}
        self.project, tasks = create_project(server, "Deferred", label_config, images)
        self.tasks = sorted(tasks.values())
        client = LabelStudioClient(server.url, server.login.token)
        self.key = client.project(self.project).key
        self.label_config = label_config
        self.shown = [
            {"id": task["id"], "data": task["data"]}
            for start in range(0, count, 100)
            for task in client.tasks(self.project, self.tasks[start : start + 100])
        ]
        # Uses the running backend's database and artefacts in this process.
        self.backend = Backend(load_settings(running.settings))

    def defer(self) -> int:
        """Ask for a job that predicts all tasks, as a request does; return its id."""
        row = self.backend.ingest.introduce(
            self.key, self.project, label_config=self.label_config
        ).id
        return self.backend.requests.deferred_predictions(row, self.shown)

    def job(self, number: int) -> Job:
        """Return a job, which must exist."""
        job = self.backend.jobs.get(number)
        assert job is not None
        return job

    def wait_until_ended(self, number: int) -> Job:
        """Wait for a job's end; return the job."""
        wait_for(
            lambda: self.job(number).state not in {JobState.QUEUED, JobState.RUNNING},
            within=120,
            what=f"the job ends: {self.running.tail()}",
        )
        return self.job(number)

    def predictions(self) -> dict[int, Counter[str]]:
        """Count the predictions of each version that Label Studio holds, task by task."""
        return predictions_by_task(self.server, self.project)


@pytest.fixture
def running(label_studio: LabelStudioServer, tmp_path: Path) -> Iterator[RunningBackend]:
    """Prepare a backend that knows Label Studio; tests start it."""
    backend = RunningBackend(
        tmp_path,
        LABEL_STUDIO_URL=label_studio.url,
        LABEL_STUDIO_API_KEY=label_studio.login.token,
        ML_BACKEND_AUTO_LABEL="false",
    )
    yield backend
    backend.stop()


def test_deferred_predictions_process_killed_goes_on_after_its_checkpoint(
    label_studio: LabelStudioServer, running: RunningBackend
) -> None:
    site = Site(label_studio, running, 220)
    cpu = torch.device("cpu")
    detector = Detector.pretrained(preset_named("tiny", cpu), SHAPES[:3], "none", cpu)
    detector.thresholds = dict.fromkeys(SHAPES[:3], 0.5)
    make_live(site.backend, detector, "v1", key=site.key, label_config=LABEL_CONFIG)
    number = site.defer()
    running.start()
    wait_for(lambda: site.job(number).progress, within=120, what="some are done", every=0.02)
    (process,) = running.job_processes("predict")
    process.suspend()
    assert process.nice() == 19
    # A task that takes long does not let the job count as abandoned.
    silent = site.job(number)
    wait_for(
        lambda: site.job(number).heartbeat_at != silent.heartbeat_at,
        within=20,
        what="its heartbeat",
    )
    assert silent.checkpoint["done"] == 100
    process.kill()
    wait_for(lambda: site.job(number).state == JobState.QUEUED, within=20, what="it is put back")
    assert site.job(number).checkpoint["done"] == 100
    job = site.wait_until_ended(number)
    assert (job.state, job.version, job.checkpoint["done"]) == ("done", "v1", 220)
    assert words(job.reason) == "220 predictions imported for 220 left-over tasks"
    assert site.predictions() == {task: Counter(v1=1) for task in site.tasks}


def test_deferred_predictions_no_token_are_refused_with_the_remedy(
    label_studio: LabelStudioServer, running: RunningBackend
) -> None:
    site = Site(label_studio, running, 2)
    del running.settings["LABEL_STUDIO_API_KEY"]
    running.start()
    job = site.wait_until_ended(site.defer())
    assert job.state == "refused"
    assert "without a token: set LABEL_STUDIO_URL and LABEL_STUDIO_API_KEY" in words(job.reason)


def test_deferred_predictions_untrained_project_come_from_coco_weights(
    label_studio: LabelStudioServer, running: RunningBackend, tmp_path: Path
) -> None:
    known = SMALL.architecture.published_labels or ()
    torch.manual_seed(0)
    state: dict[str, Any] = SMALL.architecture.build(len(known)).state_dict()
    state["roi_heads.box_predictor.cls_score.bias"][known.index("truck") + 1] = 12.0
    # Weights in torch's cache take the place of the download, which needs the internet.
    weights = FasterRCNN_MobileNet_V3_Large_320_FPN_Weights.COCO_V1
    checkpoints = tmp_path / "torch/hub/checkpoints"
    checkpoints.mkdir(parents=True)
    torch.save(state, checkpoints / weights.url.rpartition("/")[2])
    running.settings |= {
        "TORCH_HOME": str(tmp_path / "torch"),
        "ML_BACKEND_PRESET": "small",
        "ML_BACKEND_WEIGHTS": "auto",
    }
    site = Site(label_studio, running, 3, TRUCKS)
    running.start()
    job = site.wait_until_ended(site.defer())
    assert (job.state, job.version) == ("done", "untrained-coco"), words(job.reason)
    assert words(job.reason) == "3 predictions imported for 3 left-over tasks"
    assert site.predictions() == {task: Counter({"untrained-coco": 1}) for task in site.tasks}
