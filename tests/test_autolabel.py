"""Auto-labelling: each task gets one prediction of each version, whatever is killed."""

from __future__ import annotations

import dataclasses
import functools
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
import torch
from sqlalchemy import select

from ml_backend.backend import Backend
from ml_backend.demo.label_studio_server import LabelStudioServer
from ml_backend.demo.project import LABEL_CONFIG, annotate, create_project, upload
from ml_backend.demo.shapes import SHAPES, ShapeImage, generate
from ml_backend.detection.detector import Detector
from ml_backend.detection.presets import preset_named
from ml_backend.jobs.reports import End, Reporter
from ml_backend.label_studio.client import LabelStudioClient
from ml_backend.programs.job import run
from ml_backend.settings import load_settings
from ml_backend.store.states import Trigger
from ml_backend.store.tables import Job
from ml_backend.wording import words
from tests.conftest import (
    RunBackend,
    RunningBackend,
    ask,
    make_live,
    predictions_by_task,
    wait_for,
)
from tests.job_process import claim


def _images(count: int, seed: int) -> list[ShapeImage]:
    return generate(count, seed=seed, width=128, height=96)


class Site:
    """Use a project in Label Studio, and a backend that may run or not."""

    def __init__(
        self, server: LabelStudioServer, running: RunningBackend, images: list[ShapeImage]
    ) -> None:
        self.server = server
        self.running = running
        self.project, tasks = create_project(
            server, "Auto-labelling", LABEL_CONFIG, {i.name: i.encoded() for i in images}
        )
        self.images = {tasks[i.name]: i for i in images}
        self.tasks = list(self.images)
        self.client = LabelStudioClient(server.url, server.login.token)
        self.key = self.client.project(self.project).key
        # Uses the running backend's database and artefacts in this process.
        self.backend = Backend(load_settings(running.settings))

    def call(self, method: str, path: str, body: object = None) -> Any:
        """Send a request to Label Studio's API; return its answer."""
        return ask(self.server, method, path, body)

    def annotate(self, tasks: list[int]) -> None:
        """Annotate tasks with the boxes of the shapes on their images."""
        annotate(self.server, {task: self.images[task] for task in tasks})

    def predictions(self) -> dict[int, Counter[str]]:
        """Count the predictions of each version that Label Studio holds, task by task."""
        return predictions_by_task(self.server, self.project)

    def promote(self, version: str) -> None:
        """Make a version live, as a training does."""
        make_live(self.backend, _detector(), version, key=self.key, label_config=LABEL_CONFIG)

    def jobs(self, kind: str = "autolabel") -> list[Job]:
        """Return the project's jobs of a kind, newest first."""
        with self.backend.database.reading() as session:
            known = self.backend.ingest.introduce(
                self.key, self.project, label_config=LABEL_CONFIG
            ).id
            return list(
                session.scalars(
                    select(Job)
                    .where(Job.project_id == known, Job.kind == kind)
                    .order_by(Job.id.desc())
                )
            )

    def wait_until_done(self, version: str, kind: str = "autolabel", within: float = 180) -> Job:
        """Wait until the newest job is done, for this version if it names one; return it."""

        def ended() -> Job | None:
            jobs = self.jobs(kind)
            if not jobs or jobs[0].state != "done":
                return None
            return jobs[0] if jobs[0].version in (version, None) else None

        try:
            job = wait_for(ended, within=within, what=f"{kind} of {version} ends")
        except AssertionError:
            said = [(j.kind, j.state, words(j.reason)) for j in self.jobs(kind)]
            raise AssertionError(f"{said}\n{self.running.tail()}") from None
        assert isinstance(job, Job)
        return job

    def wait_until_part_done(self) -> Job:
        """Wait until auto-labelling has done a part of its tasks; return its job."""

        def part() -> Job | None:
            jobs = self.jobs()
            if not jobs:
                return None
            assert jobs[0].state in ("queued", "running"), words(jobs[0].reason)
            under_way = jobs[0].state == "running" and 0 < jobs[0].progress < 1
            return jobs[0] if under_way else None

        job = wait_for(part, within=180, what="it is under way", every=0.02)
        assert isinstance(job, Job)
        return job

    def start_now(self, job: Job) -> None:
        """Put a job that waits for its time into the queue, to start at once."""
        with self.backend.database.session() as session:
            row = session.get_one(Job, job.id, with_for_update=True)
            row.not_before = None
            self.backend.queue.put(session, row)


@pytest.fixture(scope="module")
def running(
    label_studio: LabelStudioServer,
    run_backend: RunBackend,
    tmp_path_factory: pytest.TempPathFactory,
) -> RunningBackend:
    """Run a backend for all tests of this file that do not kill it."""
    folder = tmp_path_factory.mktemp("backend")
    return run_backend(RunningBackend(folder, **_settings(label_studio)))


def _settings(server: LabelStudioServer) -> dict[str, str]:
    return {"LABEL_STUDIO_URL": server.url, "LABEL_STUDIO_API_KEY": server.login.token}


@functools.cache
def _detector() -> Detector:
    """Return a detector that has learned nothing."""
    cpu = torch.device("cpu")
    detector = Detector.pretrained(preset_named("tiny", cpu), SHAPES[:3], "none", cpu)
    detector.thresholds = dict.fromkeys(SHAPES[:3], 0.5)
    return detector


def test_autolabel_killed_half_way_goes_on_and_doubles_nothing(
    label_studio: LabelStudioServer, tmp_path: Path
) -> None:
    backend = RunningBackend(tmp_path, **_settings(label_studio))
    site = Site(label_studio, backend, _images(120, seed=21))
    annotated, rest = site.tasks[:10], site.tasks[10:]
    site.annotate(annotated)
    site.promote("v1")
    backend.start()
    try:
        # The promotion starts auto-labelling.
        first = site.wait_until_part_done()
        assert first.trigger == "promotion"
        (process,) = backend.job_processes("autolabel")
        assert process.nice() == 19
        process.kill()
        wait_for(lambda: site.jobs()[0].state == "queued", within=20, what="it is put back")
        site.start_now(first)
        wait_for(
            lambda: backend.job_processes("autolabel"), within=180, what="it goes on", every=0.02
        )
        # Kill the whole backend with all of its processes.
        family = psutil.Process(backend.pid).children(recursive=True)
        for member in [psutil.Process(backend.pid), *family]:
            member.kill()
        psutil.wait_procs(family, 20)
        backend.kill()
        assert site.jobs()[0].state == "running"
        partly = site.predictions()
        assert 0 < len(partly) < len(rest)
        backend.start()
        job = site.wait_until_done("v1")
        assert job.id == first.id
        assert "tasks predicted by v1" in words(job.reason)
        assert site.predictions() == {task: Counter(v1=1) for task in rest}
        assert len(site.jobs()) == 1
    finally:
        backend.stop()


def test_autolabel_shards_failed_before_a_checkpoint_fails_with_their_reason(
    label_studio: LabelStudioServer, tmp_path: Path
) -> None:
    settings = {**_settings(label_studio), "ML_BACKEND_AUTO_LABEL_SHARD": "1"}
    site = Site(label_studio, RunningBackend(tmp_path, **settings), _images(3, seed=27))
    site.promote("v1")
    site.promote("v2")
    # The version before serves in its place, and its predictions are no substitute.
    artefact = site.backend.artefacts.existing(site.key, "v2")
    (artefact / "model.safetensors").write_text("damaged")
    project = site.backend.ingest.introduce(site.key, site.project, label_config=LABEL_CONFIG).id
    asked = site.backend.requests.autolabel(project, trigger=Trigger.COMMAND, forced=True)
    assert asked is not None
    _run_here(site.backend, asked.job)
    shards = site.jobs("autolabel_shard")
    assert len(shards) == 3
    for shard in shards:
        _run_here(site.backend, shard.id)
    _run_here(site.backend, asked.job)
    jobs = [*site.jobs(), *site.jobs("autolabel_shard")]
    assert [job.state for job in jobs] == ["failed"] * 4
    assert {words(job.reason) for job in jobs} == {
        "v2 cannot be loaded (v1 predicts in its place): the log says why"
    }
    assert site.predictions() == {}


def _run_here(backend: Backend, number: int) -> None:
    """Do one run of a job in this process; its reports on the way are dropped."""
    job = claim(backend, number)
    with Path(os.devnull).open("wb") as dropped:
        report = Reporter(dropped.fileno(), lambda: True)
        outcome = run(backend, job, report, {})
    backend.job_run(job, threading.Event()).apply(End.of(outcome))


def test_stale_predictions_new_version_are_removed_and_nothing_else(
    label_studio: LabelStudioServer, running: RunningBackend
) -> None:
    site = Site(label_studio, running, _images(24, seed=22))
    running.command("connect", "--project", str(site.project), "--url", running.url)
    site.promote("v1")
    site.wait_until_done("v1")
    assert site.predictions() == {task: Counter(v1=1) for task in site.tasks}
    # Another backend has predicted as well, and an annotation began with one of our predictions.
    theirs = {"task": site.tasks[0], "result": [], "score": 0.5, "model_version": "theirs"}
    site.call("POST", f"/api/projects/{site.project}/import/predictions", [theirs])
    (begun,) = site.call("GET", f"/api/predictions/?task={site.tasks[1]}")
    annotation = site.call(
        "POST",
        f"/api/tasks/{site.tasks[1]}/annotations/",
        {"result": [], "lead_time": 3.0, "parent_prediction": begun["id"]},
    )
    # A task that is opened during an import gets two predictions.
    double = {"task": site.tasks[2], "result": [], "score": 0.5, "model_version": "v2"}
    site.call("POST", f"/api/projects/{site.project}/import/predictions", [double, double])

    site.promote("v2")
    job = site.wait_until_done("v2")
    assert job.trigger == "promotion"
    held = site.predictions()
    assert held[site.tasks[0]] == Counter(v1=1, v2=1, theirs=1)
    assert held[site.tasks[1]] == Counter(v1=1)
    # They are not removed at once: a task that is open may have begun with one of them.
    cleanup = wait_for(lambda: site.jobs("remove_stale"), within=5, what="a job that removes")[0]
    assert cleanup.state == "queued"
    assert "predictions of older versions are removed at" in words(cleanup.reason)
    site.start_now(cleanup)
    # The audits of these predictions are counted first.
    removed = wait_for(
        lambda: site.jobs("remove_stale")[0].state == "done" and site.jobs("remove_stale")[0],
        within=180,
        what="older predictions are removed",
    )
    assert words(removed.reason) == (
        "24 predictions of older versions removed (v1), and 1 doubled ones"
    )
    expected = {task: Counter(v2=1) for task in site.tasks if task != site.tasks[1]}
    expected[site.tasks[0]]["theirs"] += 1
    assert site.predictions() == expected
    kept = site.call("GET", f"/api/annotations/{annotation['id']}/")
    assert kept["parent_prediction"] is None
    # The reason for the wait: Label Studio refuses annotations that began with a removed one.
    late = requests.post(
        f"{label_studio.url}/api/tasks/{site.tasks[3]}/annotations/",
        headers={"Authorization": f"Token {label_studio.login.token}"},
        json={"result": [], "parent_prediction": begun["id"]},
        timeout=60,
    )
    assert late.status_code == 400
    (status,) = [p for p in running.json("status") if p["project"] == site.key]
    assert status["audits"]["versions"]["v1"]["annotations"] == 1
    # Label Studio still orders tasks by the live version.
    wait_for(
        lambda: site.call("GET", f"/api/projects/{site.project}/")["model_version"] == "v2",
        within=20,
        what="the title follows",
    )

    # New tasks start auto-labelling.
    fresh = upload(label_studio, site.project, {i.name: i.encoded() for i in _images(3, seed=122)})
    arrived = wait_for(
        lambda: site.jobs()[0].trigger == "tasks" and site.jobs()[0],
        within=20,
        what="a job for the new tasks",
    )
    assert words(arrived.reason) == "new tasks have arrived"
    site.wait_until_done("v2")
    assert words(site.jobs()[0].reason) == "3 of 3 tasks predicted by v2"
    held = site.predictions()
    assert [held[task] for task in fresh.values()] == [Counter(v2=1)] * 3


def test_autolabel_promotion_meanwhile_ends_and_the_next_version_begins(
    label_studio: LabelStudioServer, running: RunningBackend
) -> None:
    site = Site(label_studio, running, _images(100, seed=23))
    site.promote("v1")
    first = site.wait_until_part_done()
    site.promote("v2")
    following = site.wait_until_done("v2")
    assert following.id != first.id
    superseded = site.jobs()[-1]
    assert superseded.id == first.id
    assert superseded.state == "done"
    assert words(superseded.reason).startswith("superseded by v2 at ")
    held = site.predictions()
    assert {task: found["v2"] for task, found in held.items()} == dict.fromkeys(site.tasks, 1)
    assert 0 < sum(found["v1"] for found in held.values()) < len(site.tasks)


def test_connect_untrained_project_orders_tasks_by_how_they_differ(
    label_studio: LabelStudioServer, running: RunningBackend
) -> None:
    # Twelve copies of one image, and six that differ.
    images = _images(7, seed=26)
    copies = [dataclasses.replace(images[0], name=f"copy-{n}.jpg") for n in range(12)]
    site = Site(label_studio, running, [*copies, *images[1:]])
    running.command("connect", "--project", str(site.project), "--url", running.url)
    site.wait_until_done("untrained")
    held = site.call("GET", f"/api/predictions/?project={site.project}")
    order = [p["task"] for p in sorted(held, key=lambda p: p["score"])]
    assert sorted(order) == sorted(site.tasks)
    names = [site.images[task].name for task in order]
    assert sum(name.startswith("copy-") for name in names[:7]) == 1, names
    # Label Studio shows tasks in that order.
    following = site.call("GET", f"/api/projects/{site.project}/next/")
    assert following["id"] == order[0]
    # The order is made once.
    assert len(site.jobs()) == 1


def test_autolabel_command_reports_done_left_out_and_failed_tasks(
    label_studio: LabelStudioServer, running: RunningBackend
) -> None:
    site = Site(label_studio, running, _images(21, seed=24))
    # One image does not exist: only its task is left out.
    site.call("POST", f"/api/projects/{site.project}/import", [{"image": "/data/upload/no.jpg"}])
    site.backend.ingest.introduce(site.key, site.project, label_config=LABEL_CONFIG)
    project = ["--project", str(site.project)]
    # Without a model, the first tasks are ordered by how they differ.
    begun = running.json("autolabel", *project)
    assert (begun["state"], begun["version"]) == ("done", "untrained")
    assert begun["reason"] == "21 tasks chosen to begin with, for how they differ"
    chosen = site.call("GET", f"/api/predictions/?project={site.project}")
    assert all(p["result"] == [] and p["model_version"] == "untrained" for p in chosen)
    assert sorted(p["score"] for p in chosen) == pytest.approx([n / 21 for n in range(21)])

    site.promote("v1")
    done = running.json("autolabel", *project)
    assert (done["state"], done["kind"], done["version"]) == ("done", "autolabel", "v1")
    assert done["progress"] == 1.0
    assert done["reason"].startswith("21 of 22 tasks predicted by v1; 1 left out, for example task")
    assert "/data/upload/no.jpg answers status" in done["reason"]
    assert site.predictions() == {task: Counter(untrained=1, v1=1) for task in site.tasks}
    answer = running.post("/job_status", {"job": done["job"]}).json()
    assert answer["job_status"] == "done"
    assert 'ml_backend_jobs{kind="autolabel",state="done"}' in running.get("/metrics").text
    # The next run tries only the task that is left, and fails.
    said = running.json("autolabel", *project, status=1)
    assert said["state"] == "failed"
    assert said["reason"].startswith("no task could be predicted; 1 left out")

    assert "is not known" in running.failing("autolabel", "--project", "999999")
    token = running.settings.pop("LABEL_STUDIO_API_KEY")
    try:
        assert "LABEL_STUDIO_API_KEY" in running.failing("autolabel", *project)
    finally:
        running.settings["LABEL_STUDIO_API_KEY"] = token


def test_autolabel_command_interrupted_leaves_the_job_running(
    label_studio: LabelStudioServer, running: RunningBackend
) -> None:
    site = Site(label_studio, running, _images(2, seed=25))
    site.promote("v1")
    site.wait_until_done("v1")
    # No webhook reports these tasks: only the command finds them.
    more = _images(100, seed=125)
    upload(label_studio, site.project, {i.name: i.encoded() for i in more})
    with subprocess.Popen(
        [
            *(sys.executable, "-m", "ml_backend.cli", "autolabel"),
            *("--project", str(site.project)),
        ],
        env=running.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell ignores SIGINT for what it runs in the background, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as command:
        wait_for(lambda: len(site.jobs()) == 2, within=180, what="its job")
        site.wait_until_part_done()
        command.send_signal(signal.SIGINT)
        _, said = command.communicate(timeout=120)
    assert command.returncode == 130, said
    assert "goes on without you" in said
    site.wait_until_done("v1")
    assert list(site.predictions().values()) == [Counter(v1=1)] * 102
    # Run again, the command says that there is nothing to do.
    said = running.command("autolabel", "--project", str(site.project))
    assert "every task without an annotation has one of v1" in said
