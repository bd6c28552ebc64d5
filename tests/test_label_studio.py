"""Test the client, reconciling, connecting and the doctor against a real Label Studio."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from sqlalchemy import select, update

from ml_backend.backend import Backend
from ml_backend.demo.label_studio_server import LabelStudioServer, free_port
from ml_backend.demo.project import LABEL_CONFIG, annotate, create_project, regions
from ml_backend.demo.shapes import SHAPES, ShapeImage, generate
from ml_backend.detection.detector import Detector
from ml_backend.detection.presets import preset_named
from ml_backend.label_studio.client import LabelStudioClient
from ml_backend.label_studio.errors import (
    BadAnswer,
    Failed,
    LabelStudioError,
    NotFound,
    Unauthorized,
    Unreachable,
)
from ml_backend.label_studio.events import Ignored, parse_event
from ml_backend.projects.counts import annotated_tasks, live_annotations
from ml_backend.projects.reconcile import Reconciled, reconcile
from ml_backend.settings import load_settings
from ml_backend.store.tables import Annotation, Project, Task, now
from tests.conftest import RunningBackend, ask, label_studio_program, make_live, wait_for
from tests.test_away import Proxy

QUICK = {
    "ML_BACKEND_PRESET": "tests.quick:PRESET",
    "ML_BACKEND_TRAIN_MIN": "4",
    "ML_BACKEND_TRAIN_EVERY": "4",
    "ML_BACKEND_TRAIN_DELAY": "0",
    "ML_BACKEND_AUTO_LABEL": "false",
}
"""Settings for trainings of a second, after four annotated tasks."""


@pytest.fixture(scope="module")
def personal_token(label_studio: LabelStudioServer) -> str:
    """Makes a personal access token, as Account & Settings does."""
    token = str(ask(label_studio, "POST", "/api/token/")["token"])
    assert token.count(".") == 2
    return token


@pytest.fixture(params=["legacy", "personal"])
def client(
    request: pytest.FixtureRequest, label_studio: LabelStudioServer, personal_token: str
) -> LabelStudioClient:
    """Makes a client with either kind of token."""
    token = label_studio.login.token if request.param == "legacy" else personal_token
    return LabelStudioClient(label_studio.url, token)


def _project(
    server: LabelStudioServer, count: int, *, seed: int = 11
) -> tuple[int, dict[int, ShapeImage]]:
    images = generate(count, seed=seed, width=128, height=96)
    project, tasks = create_project(
        server, "Client", LABEL_CONFIG, {i.name: i.encoded() for i in images}
    )
    return project, {tasks[image.name]: image for image in images}


def test_client_legacy_and_personal_tokens_are_accepted(
    client: LabelStudioClient, label_studio: LabelStudioServer
) -> None:
    assert client.version() == "1.23.2"
    assert client.whoami()["email"] == label_studio.login.email
    project, images = _project(label_studio, 3)
    info = client.project(project)
    assert info.id == project
    assert info.label_config == LABEL_CONFIG
    assert info.key.startswith(f"{project}.")
    annotate(label_studio, images)
    pages = list(client.annotated_tasks(project, changed_since=None))
    assert [task["id"] for page in pages for task in page] == sorted(images)
    # An access token that Label Studio no longer takes is exchanged anew.
    client.refresh_auth()
    assert client.annotation_count(project) == 3


@pytest.mark.parametrize("token", ["0" * 40, "aaaa.bbbb.cccc", "no token"])
def test_client_wrong_token_error_names_the_remedy(
    label_studio: LabelStudioServer, token: str
) -> None:
    client = LabelStudioClient(label_studio.url, token)
    with pytest.raises(LabelStudioError, match="Account & Settings") as caught:
        client.whoami()
    assert isinstance(caught.value, Unauthorized)
    assert token not in str(caught.value)


def test_client_unreachable_address_error_names_the_setting() -> None:
    client = LabelStudioClient(f"http://127.0.0.1:{free_port()}", "0" * 40)
    with pytest.raises(Unreachable, match="LABEL_STUDIO_URL"):
        client.whoami()


@pytest.mark.parametrize("how", ["500", "HTML"])
def test_client_failing_token_exchange_is_not_reported_as_a_wrong_token(
    label_studio: LabelStudioServer, personal_token: str, how: str
) -> None:
    proxy = Proxy(label_studio.port)
    client = LabelStudioClient(proxy.url, personal_token)
    assert client.whoami()["email"] == label_studio.login.email
    proxy.become(how)
    client.refresh_auth()
    with pytest.raises(BadAnswer, match="exchanges no token") as caught:
        client.whoami()
    assert personal_token not in str(caught.value)
    proxy.become("through")
    assert client.whoami()["email"] == label_studio.login.email
    proxy.become("refused")


@contextmanager
def _answering(status: int, body: bytes, **headers: str) -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Says nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_client_answers_of_another_server_raise_bad_answer_or_failed() -> None:
    page = _answering(200, b"<html>login</html>", Content_Type="text/html")
    with page as url, pytest.raises(BadAnswer, match="text/html instead of JSON"):
        LabelStudioClient(url, "0" * 40).whoami()
    moved = _answering(302, b"", Location="https://elsewhere.example/")
    with moved as url, pytest.raises(BadAnswer, match=r"redirected to https://elsewhere\.example/"):
        LabelStudioClient(url, "0" * 40).whoami()
    with _answering(500, b"broken") as url, pytest.raises(Failed, match="500"):
        LabelStudioClient(url, "0" * 40).whoami()


def test_client_missing_project_error_names_it(label_studio: LabelStudioServer) -> None:
    client = LabelStudioClient(label_studio.url, label_studio.login.token)
    with pytest.raises(NotFound, match="/api/projects/999999"):
        client.project(999999)


def test_import_predictions_deleted_task_does_not_stop_the_others(
    label_studio: LabelStudioServer,
) -> None:
    client = LabelStudioClient(label_studio.url, label_studio.login.token)
    project, images = _project(label_studio, 5)
    tasks = list(images)
    ask(label_studio, "DELETE", f"/api/tasks/{tasks[2]}/")
    predictions = [
        {"task": task, "result": regions(images[task]), "score": 0.5, "model_version": "v1"}
        for task in tasks
    ]
    assert client.import_predictions(project, predictions) == 4
    assert client.predicted_tasks(project, "v1", tasks) == {*tasks} - {tasks[2]}
    assert client.predicted_tasks(project, "v2", tasks) == set()


def test_reconcile_reads_changes_that_no_webhook_reported(
    label_studio: LabelStudioServer, tmp_path: Path
) -> None:
    project, images = _project(label_studio, 8)
    tasks = list(images)
    annotate(label_studio, {task: images[task] for task in tasks[:6]})
    client = LabelStudioClient(label_studio.url, label_studio.login.token)
    backend = Backend(load_settings({"MODEL_DIR": str(tmp_path)}))
    info = client.project(project)
    row = backend.ingest.introduce(info.key, info.id, label_config=info.label_config)

    def read_back() -> tuple[int, int, int]:
        with backend.database.reading() as session:
            current = session.get_one(Project, row.id)
        done = reconcile(current, client, backend.database, backend.ingest)
        with backend.database.reading() as session:
            return done.tasks, annotated_tasks(session, row.id), live_annotations(session, row.id)

    assert read_back() == (6, 6, 6)
    # The clocks' overlap makes it read some again, which changes nothing.
    with backend.database.reading() as session:
        revision = session.get_one(Project, row.id).revision
    read_back()
    with backend.database.reading() as session:
        assert session.get_one(Project, row.id).revision == revision

    # Changed, deleted, skipped and bulk-deleted while nobody listened.
    first = ask(label_studio, "GET", f"/api/tasks/{tasks[0]}/annotations/")[0]["id"]
    ask(label_studio, "PATCH", f"/api/annotations/{first}/", {"result": []})
    second = ask(label_studio, "GET", f"/api/tasks/{tasks[1]}/annotations/")[0]["id"]
    ask(label_studio, "DELETE", f"/api/annotations/{second}/")
    ask(label_studio, "DELETE", f"/api/tasks/{tasks[2]}/")
    third = ask(label_studio, "GET", f"/api/tasks/{tasks[3]}/annotations/")[0]["id"]
    ask(label_studio, "PATCH", f"/api/annotations/{third}/", {"was_cancelled": True})
    annotate(label_studio, {tasks[6]: images[tasks[6]]})
    _, left, annotations = read_back()
    assert (left, annotations) == (4, 4)


class Known:
    """A project in Label Studio, and what is known of it here; nobody listens to webhooks.

    Args:
        server: the Label Studio.
        folder: for the state.
        count: images, each a task.
    """

    def __init__(self, server: LabelStudioServer, folder: Path, count: int) -> None:
        self.server = server
        self.project, self.images = _project(server, count)
        self.tasks = list(self.images)
        self.client = LabelStudioClient(server.url, server.login.token)
        self.backend = Backend(load_settings({"MODEL_DIR": str(folder)}))
        info = self.client.project(self.project)
        self.row = self.backend.ingest.introduce(
            info.key, info.id, label_config=info.label_config
        ).id

    def annotate(self, *tasks: int) -> list[int]:
        """Draws the boxes of tasks; answers the ids of the annotations."""
        annotate(self.server, {task: self.images[task] for task in tasks})
        return [
            ask(self.server, "GET", f"/api/tasks/{task}/annotations/")[-1]["id"] for task in tasks
        ]

    def hear(self, action: str, **content: object) -> None:
        """Applies a webhook as Label Studio would send it now."""
        project = ask(self.server, "GET", f"/api/projects/{self.project}/")
        event = parse_event({"action": action, "project": project, **content})
        assert not isinstance(event, Ignored)
        self.backend.ingest.apply(event, event.project)

    def hear_of(self, task: int) -> None:
        """Hears of a task's annotations."""
        shown = ask(self.server, "GET", f"/api/tasks/{task}/")
        self.hear("ANNOTATIONS_CREATED", annotation=shown["annotations"], task=shown)

    def skip(self, annotation: int, skipped: bool = True) -> None:
        """Skips an annotation, or takes it back."""
        path = f"/api/annotations/{annotation}/"
        ask(self.server, "PATCH", path, {"was_cancelled": skipped})

    def read_back(self) -> Reconciled:
        """Reads back what changed."""
        with self.backend.database.reading() as session:
            current = session.get_one(Project, self.row)
        return reconcile(current, self.client, self.backend.database, self.backend.ingest)

    def counts(self) -> tuple[int, int]:
        """Annotated tasks and live annotations."""
        with self.backend.database.reading() as session:
            return annotated_tasks(session, self.row), live_annotations(session, self.row)

    def buried(self) -> set[int]:
        """Tasks that are taken for deleted."""
        with self.backend.database.reading() as session:
            return set(
                session.scalars(
                    select(Task.label_studio_id).where(
                        Task.project_id == self.row, Task.deleted_at.is_not(None)
                    )
                )
            )


def test_reconcile_task_annotated_again_after_an_unreported_deletion_is_restored(
    label_studio: LabelStudioServer, tmp_path: Path
) -> None:
    known = Known(label_studio, tmp_path, 5)
    skipped, emptied, gone, stays, other = known.tasks
    annotations = dict(zip(known.tasks, known.annotate(*known.tasks), strict=True))
    for task in known.tasks:
        known.hear_of(task)
    assert known.counts() == (5, 5)
    known.skip(annotations[skipped])
    ask(label_studio, "DELETE", f"/api/annotations/{annotations[emptied]}/")
    ask(label_studio, "DELETE", f"/api/tasks/{gone}/")
    assert known.read_back().removed == 1
    assert known.buried() == {gone}
    assert known.counts() == (2, 2)
    with known.backend.database.reading() as session:
        row = session.scalars(
            select(Annotation).where(Annotation.label_studio_id == annotations[skipped])
        ).one()
    assert row.was_cancelled
    assert row.deleted_at is None

    known.skip(annotations[skipped], skipped=False)
    known.annotate(emptied)
    known.read_back()
    assert known.counts() == (4, 4)
    # What an earlier release took for deleted, and nobody has touched since.
    known.hear("TASKS_DELETED", tasks=[{"id": stays}])
    with known.backend.database.session() as session:
        session.execute(update(Project).values(reconciled_at=now() + timedelta(days=1)))
    known.read_back()
    assert known.counts() == (4, 4)
    assert known.buried() == {gone}
    ask(label_studio, "DELETE", f"/api/tasks/{other}/")
    known.read_back()
    assert known.counts() == (3, 3)


def test_reconcile_invalid_annotation_is_logged_and_left_out(
    label_studio: LabelStudioServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    known = Known(label_studio, tmp_path, 3)
    first, second, third = known.tasks
    # No result at all: its column holds a null.
    empty = ask(label_studio, "POST", f"/api/tasks/{first}/annotations/", {})
    assert empty["result"] is None
    known.annotate(second, third)
    known.read_back()
    assert known.counts() == (2, 2)
    assert f"the id {empty['id']} is left out: annotation.result: must be a list" in caplog.text
    assert known.buried() == set()
    ask(label_studio, "PATCH", f"/api/annotations/{empty['id']}/", {"result": []})
    known.read_back()
    assert known.counts() == (3, 3)


def test_annotated_tasks_changed_since_gives_only_later_changes(
    label_studio: LabelStudioServer,
) -> None:
    project, images = _project(label_studio, 6)
    tasks = list(images)
    annotate(label_studio, {task: images[task] for task in tasks[:3]})
    client = LabelStudioClient(label_studio.url, label_studio.login.token)
    moment = datetime.now(UTC)
    annotate(label_studio, {tasks[4]: images[tasks[4]]})
    first = ask(label_studio, "GET", f"/api/tasks/{tasks[0]}/annotations/")[0]["id"]
    ask(label_studio, "PATCH", f"/api/annotations/{first}/", {"result": []})
    pages = list(client.annotated_tasks(project, changed_since=moment))
    assert [task["id"] for page in pages for task in page] == [tasks[0], tasks[4]]


@pytest.fixture
def unstarted(label_studio: LabelStudioServer, tmp_path: Path) -> RunningBackend:
    """Makes a backend that knows Label Studio and does not run."""
    return RunningBackend(
        tmp_path,
        LABEL_STUDIO_URL=label_studio.url,
        LABEL_STUDIO_API_KEY=label_studio.login.token,
    )


def test_connect_errors_name_the_fault(
    label_studio: LabelStudioServer, unstarted: RunningBackend
) -> None:
    classes = '<View><Text name="t" value="$t"/><Choices name="c" toName="t"><Choice value="a"/>'
    project = ask(
        label_studio,
        "POST",
        "/api/projects/",
        {"title": "No boxes", "label_config": classes + "</Choices></View>"},
    )["id"]
    said = unstarted.failing("connect", "--project", str(project))
    assert "RectangleLabels" in said
    said = unstarted.failing("connect", "--project", "999999")
    assert "999999" in said
    # The server does not run: Label Studio says so, and so do we.
    project, _ = _project(label_studio, 1)
    said = unstarted.failing("connect", "--project", str(project))
    assert "error" in said
    assert unstarted.url in said

    unstarted.settings["LABEL_STUDIO_API_KEY"] = "0" * 40
    assert "Account & Settings" in unstarted.failing("connect", "--project", str(project))
    del unstarted.settings["LABEL_STUDIO_API_KEY"]
    assert "LABEL_STUDIO_API_KEY" in unstarted.failing("connect", "--project", str(project))


def test_connect_project_annotated_before_reads_back_and_a_training_starts(
    label_studio: LabelStudioServer, unstarted: RunningBackend
) -> None:
    project, images = _project(label_studio, 12)
    annotate(label_studio, images)
    unstarted.settings |= {"ML_BACKEND_TRAIN_DELAY": "0", "ML_BACKEND_TRAIN_BUDGET": "5"}
    unstarted.start()
    try:
        done = unstarted.json("connect", "--project", str(project), "--url", unstarted.url)
        assert done["annotated_tasks"] == 12
        assert "read back from Label Studio: 12 annotated tasks" in done["steps"]
        assert {"code": "connect.read_back", "values": {"annotated": 12}} in done["step_reasons"]
        assert done["training"]["state"] in ("waiting", "queued", "running"), done

        def begun() -> bool:
            jobs = unstarted.json("status")[0]["jobs"]
            return any(j["kind"] == "train" and j["state"] in ("running", "done") for j in jobs)

        wait_for(begun, within=60, what="the training starts")
    finally:
        unstarted.stop()


def test_train_command_annotations_that_no_webhook_told_of_are_read_back_first(
    label_studio: LabelStudioServer, unstarted: RunningBackend
) -> None:
    project, images = _project(label_studio, 3)
    unstarted.start()
    try:
        unstarted.command("connect", "--project", str(project), "--url", unstarted.url)
    finally:
        unstarted.stop()
    assert "there are none" in unstarted.command("train", "--project", str(project), status=1)
    annotate(label_studio, images)
    asked = unstarted.json("train", "--project", str(project))
    assert asked["state"] == "queued", asked
    assert "3 annotated tasks" in asked["reason"]


def _trained(running: RunningBackend) -> list[dict[str, Any]]:
    """Lists the trainings of the only project that are done, newest first."""
    jobs = running.json("status")[0]["jobs"]
    return [job for job in jobs if job["kind"] == "train" and job["state"] == "done"]


def test_import_with_annotations_into_a_connected_project_leads_to_a_training(
    label_studio: LabelStudioServer, unstarted: RunningBackend
) -> None:
    project, images = _project(label_studio, 4)
    unstarted.settings |= QUICK
    unstarted.start()
    try:
        connected = unstarted.json("connect", "-p", str(project), "--url", unstarted.url)
        assert (connected["annotated_tasks"], connected["training"]) == (0, None)
        # Label Studio reports an import by `TASKS_CREATED` alone, which holds no annotation.
        tasks = [
            {
                "data": ask(label_studio, "GET", f"/api/tasks/{task}/")["data"],
                "annotations": [{"result": regions(image)}],
            }
            for task, image in images.items()
        ]
        ask(label_studio, "POST", f"/api/projects/{project}/import", tasks)
        # Nobody asks for it.
        (job,) = wait_for(lambda: _trained(unstarted), within=150, what="a training is done")
        assert job["trigger"] == "webhook"
        (version,) = unstarted.json("versions", "-p", str(project))
        assert version["card"]["data"]["tasks"] == 4
    finally:
        unstarted.stop()


def test_start_training_button_project_annotated_before_it_was_connected_trains(
    label_studio: LabelStudioServer, unstarted: RunningBackend
) -> None:
    project, images = _project(label_studio, 4)
    annotate(label_studio, images)
    # No training is due by itself, and the backend was added in Label Studio's page.
    unstarted.settings |= QUICK | {"ML_BACKEND_TRAIN_MIN": "100"}
    unstarted.start()
    try:
        body = {"url": unstarted.url, "title": "detector", "project": project}
        connection = ask(label_studio, "POST", "/api/ml", body)
        ask(label_studio, "POST", f"/api/ml/{connection['id']}/train")
        (job,) = wait_for(lambda: _trained(unstarted), within=150, what="a training is done")
        assert job["trigger"] == "button"
        (version,) = unstarted.json("versions", "-p", str(project))
        assert version["card"]["data"]["tasks"] == 4
    finally:
        unstarted.stop()


def test_doctor_errors_name_the_remedy(
    label_studio: LabelStudioServer, unstarted: RunningBackend
) -> None:
    project, _ = _project(label_studio, 1)

    def errors() -> dict[str, str]:
        found = unstarted.json("doctor", "--project", str(project), status=1)
        return {
            f["what"]: f"{f['detail']} -> {f['remedy']}" for f in found if f["status"] == "error"
        }

    found = errors()
    assert set(found) == {"server", "connection"}
    assert "ml-backend serve" in found["server"]
    assert f"ml-backend connect --project {project}" in found["connection"]
    unstarted.start()
    try:
        unstarted.command("connect", "--project", str(project), "--url", unstarted.url)
        unstarted.command("doctor", "--project", str(project))
        # Somebody removes the connection, or the webhook.
        (connection,) = ask(label_studio, "GET", f"/api/ml/?project={project}")
        (hook,) = ask(label_studio, "GET", f"/api/webhooks/?project={project}")
        ask(label_studio, "DELETE", f"/api/webhooks/{hook['id']}/")
        assert set(errors()) == {"webhook"}
        ask(label_studio, "DELETE", f"/api/ml/{connection['id']}")
        assert set(errors()) == {"connection", "webhook"}
        unstarted.command("connect", "--project", str(project), "--url", unstarted.url)
        unstarted.command("doctor", "--project", str(project))
        # Under another address it moves, and stays there when none is given.
        moved = unstarted.url.replace("127.0.0.1", "localhost")
        for address in (["--url", moved], []):
            unstarted.command("connect", "--project", str(project), *address)
            (connection,) = ask(label_studio, "GET", f"/api/ml/?project={project}")
            (hook,) = ask(label_studio, "GET", f"/api/webhooks/?project={project}")
            assert (connection["url"], hook["url"]) == (moved, f"{moved}/webhook")
        unstarted.command("doctor", "--project", str(project))
    finally:
        unstarted.stop()


def test_predict_tasks_beyond_the_deadline_are_predicted_by_a_job_and_imported(
    label_studio: LabelStudioServer, unstarted: RunningBackend
) -> None:
    project, images = _project(label_studio, 60)
    client = LabelStudioClient(label_studio.url, label_studio.login.token)
    unstarted.settings["ML_BACKEND_PREDICT_DEADLINE"] = "0.5"
    unstarted.settings["ML_BACKEND_AUTO_LABEL"] = "false"
    cpu = torch.device("cpu")
    detector = Detector.pretrained(preset_named("tiny", cpu), SHAPES[:3], "none", cpu)
    detector.thresholds = dict.fromkeys(SHAPES[:3], 0.5)
    backend = Backend(load_settings(unstarted.settings))
    key = client.project(project).key
    make_live(backend, detector, "v1", key=key, label_config=LABEL_CONFIG)
    backend.database.close()
    unstarted.start()
    try:
        unstarted.command("connect", "--project", str(project), "--url", unstarted.url)
        # "Retrieve predictions" on the whole project: one request, too long for its deadline.
        ask(
            label_studio,
            "POST",
            f"/api/dm/actions?id=retrieve_tasks_predictions&project={project}",
            {"selectedItems": {"all": True, "excluded": []}, "project": str(project)},
        )
        (job,) = wait_for(
            lambda: [j for j in unstarted.json("status")[0]["jobs"] if j["kind"] == "predict"],
            within=10,
            what="a job for the deferred tasks",
        )
        wait_for(
            lambda: unstarted.json("status")[0]["jobs"][0]["state"] == "done",
            within=180,
            what="the deferred tasks are predicted",
        )
        assert "left over" in job["reason"] or "predict" in job["reason"]
        for task in images:
            found = ask(label_studio, "GET", f"/api/predictions/?task={task}")
            assert [p["model_version"] for p in found] == ["v1"]
    finally:
        unstarted.stop()


def test_connect_label_studio_refuses_private_addresses_error_names_its_settings(
    tmp_path: Path,
) -> None:
    with LabelStudioServer(
        label_studio_program(),
        tmp_path / "label-studio",
        environment={"ML_BLOCK_LOCAL_IP": "true", "SSRF_PROTECTION_ENABLED": "true"},
    ) as guarded:
        project, _ = _project(guarded, 1)
        backend = RunningBackend(
            tmp_path, LABEL_STUDIO_URL=guarded.url, LABEL_STUDIO_API_KEY=guarded.login.token
        )
        backend.start()
        try:
            said = backend.failing("connect", "--project", str(project), "--url", backend.url)
            assert "ML_BLOCK_LOCAL_IP=false" in said
            assert "SSRF_PROTECTION_ENABLED=false" in said
        finally:
            backend.stop()
