"""Tasks that a request for predictions left over are predicted once, beside the server."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
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
from ml_backend.jobs.jobs import STALE_AFTER
from ml_backend.label_studio.client import LabelStudioClient
from ml_backend.settings import load_settings
from ml_backend.store.tables import Job, now
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
        self.project, tasks = create_project(server, "Left over", label_config, images)
        self.tasks = sorted(tasks.values())
        client = LabelStudioClient(server.url, server.login.token)
        self.key = client.project(self.project).key
        self.label_config = label_config
        self.shown = [
            {"id": task["id"], "data": task["data"]}
            for start in range(0, count, 100)
            for task in client.tasks(self.project, self.tasks[start : start + 100])
        ]
        # Opens the running backend's database and registry in this process.
        self.backend = Backend(load_settings(running.settings))

    def hand_over(self) -> int:
        """Hand all tasks over to a job, as a request does; return its number."""
        row = self.backend.ingest.introduce(
            self.key, self.project, label_config=self.label_config
        ).id
        number = self.backend.jobs.hand_over_predictions(row, self.shown)
        self.backend.tasks.put("predict", number)
        return number

    def job(self, number: int) -> Job:
        """Return a job, which must exist."""
        job = self.backend.jobs.get(number)
        assert job is not None
        return job

    def wait_until_ended(self, number: int) -> Job:
        """Wait for a job's end; return the job."""
        wait_for(
            lambda: self.job(number).state not in {"queued", "running"},
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


def _process(backend: RunningBackend) -> psutil.Process | None:
    """Return the process that predicts for a backend, if there is one."""
    for child in psutil.Process(backend.pid).children(recursive=True):
        if "ml_backend.programs.predict" in child.cmdline():
            return child
    return None


def test_left_over_tasks_process_killed_goes_on_where_it_was(
    label_studio: LabelStudioServer, running: RunningBackend
) -> None:
    site = Site(label_studio, running, 220)
    cpu = torch.device("cpu")
    detector = Detector.pretrained(preset_named("tiny", cpu), SHAPES[:3], "none", cpu)
    detector.thresholds = dict.fromkeys(SHAPES[:3], 0.5)
    make_live(site.backend, detector, "v1", key=site.key, label_config=LABEL_CONFIG)
    number = site.hand_over()
    running.start()
    wait_for(lambda: site.job(number).progress, within=120, what="some are done", every=0.02)
    process = _process(running)
    assert process is not None
    process.suspend()
    assert process.nice() == 19
    # A task that takes long does not let the job count as abandoned.
    silent = site.job(number)
    wait_for(
        lambda: site.job(number).heartbeat_at != silent.heartbeat_at,
        within=20,
        what="its heartbeat",
    )
    assert (silent.payload["done"], len(silent.payload["tasks"])) == (100, 120)
    process.kill()
    wait_for(lambda: site.job(number).state == "queued", within=20, what="it is put back")
    with site.backend.database.session() as session:
        session.get_one(Job, number).not_before = now()
        session.get_one(Job, number).heartbeat_at = now() - 2 * STALE_AFTER
    job = site.wait_until_ended(number)
    assert (job.state, job.version, job.payload["done"]) == ("done", "v1", 220)
    assert job.reason == "220 predictions imported for 220 left-over tasks"
    assert site.predictions() == {task: Counter(v1=1) for task in site.tasks}


def test_left_over_tasks_without_a_token_are_refused_with_a_reason(
    label_studio: LabelStudioServer, running: RunningBackend
) -> None:
    site = Site(label_studio, running, 2)
    del running.settings["LABEL_STUDIO_API_KEY"]
    running.start()
    job = site.wait_until_ended(site.hand_over())
    assert job.state == "refused"
    assert "without a token: set LABEL_STUDIO_URL and LABEL_STUDIO_API_KEY" in job.reason


def test_left_over_tasks_untrained_project_are_predicted_with_coco_weights(
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
    job = site.wait_until_ended(site.hand_over())
    assert (job.state, job.version) == ("done", "untrained-coco"), job.reason
    assert job.reason == "3 predictions imported for 3 left-over tasks"
    assert site.predictions() == {task: Counter({"untrained-coco": 1}) for task in site.tasks}
