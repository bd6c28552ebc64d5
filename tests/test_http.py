"""Test the endpoints with recorded requests of Label Studio, wrong ones and hostile ones."""

from __future__ import annotations

import base64
import copy
import io
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flask.testing import FlaskClient
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import select
from werkzeug.test import TestResponse

from ml_backend.backend import Backend
from ml_backend.detection.detector import Detector
from ml_backend.detection.presets import preset_named
from ml_backend.extensions import CONTROLS, ExtensionError
from ml_backend.http.app import create_app
from ml_backend.projects.connect import SECRET_HEADER
from ml_backend.reasons import Code
from ml_backend.settings import load_settings
from ml_backend.store.tables import Job, Project
from tests.conftest import CAPTURES, capture, make_live, wait_for
from tests.extension import install_extension

KEY = "1.1795463889"
CONFIG: str = capture("POST_setup")["schema"]
LABELS = ("RBC", "WBC", "Platelets")
NOTHING = '<View><Text name="t" value="$text"/></View>'
CPU = torch.device("cpu")
ENDPOINTS = {
    ("GET", "/"),
    ("GET", "/health"),
    ("GET", "/versions"),
    ("GET", "/metrics"),
    ("GET", "/openapi.json"),
    ("POST", "/setup"),
    ("POST", "/predict"),
    ("POST", "/webhook"),
    ("POST", "/validate"),
    ("POST", "/job_status"),
    ("POST", "/train"),
    ("POST", "/duplicate_model"),
    ("POST", "/delete"),
}
READING = sorted(
    path
    for method, path in ENDPOINTS
    if method == "POST" and path not in ("/duplicate_model", "/delete")
)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Limits PyTorch to one thread: with tiny detectors, more would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Served:
    """Runs the application on a folder of its own; requests reach it without a network."""

    def __init__(self, folder: Path, **settings: str) -> None:
        self.backend = Backend(
            load_settings(
                {
                    "ML_BACKEND_DEVICE": "cpu",
                    "ML_BACKEND_WEIGHTS": "none",
                    "ML_BACKEND_PRESET": "tiny",
                    "MODEL_DIR": str(folder),
                    **settings,
                }
            )
        )
        self.app = create_app(self.backend)
        self.client: FlaskClient = self.app.test_client()

    def close(self) -> None:
        """Ends its threads."""
        self.backend.models.close()
        self.backend.database.close()

    def post(self, path: str, body: object, **headers: str) -> TestResponse:
        """Sends POST of JSON."""
        return self.client.post(path, json=body, headers=headers)

    def predict(
        self, tasks: Sequence[Mapping[str, Any]], *, config: str = CONFIG, key: str = KEY
    ) -> list[Any]:
        """Sends tasks to `/predict`; answers the results, as many as tasks."""
        body = {"tasks": tasks, "project": key, "label_config": config}
        answer = self.post("/predict", body)
        assert answer.status_code == 200, answer.text
        results: list[Any] = answer.json["results"] if answer.json else []
        assert len(results) == len(tasks)
        return results

    def version(self, *, key: str = KEY, config: str = CONFIG) -> str:
        """Reads the version that `/setup` answers."""
        answer = self.post("/setup", {"project": key, "schema": config})
        assert answer.status_code == 200, answer.text
        assert answer.json is not None
        version: str = answer.json["model_version"]
        return version

    def project(self, *, key: str = KEY) -> Project:
        """Reads the row of a known project."""
        with self.backend.database.reading() as session:
            return session.scalars(select(Project).where(Project.key == key)).one()

    def jobs(self, kind: str) -> list[Job]:
        """Reads the jobs of a kind."""
        with self.backend.database.reading() as session:
            return list(session.scalars(select(Job).where(Job.kind == kind).order_by(Job.id)))

    def metric(self, name: str, **labels: str) -> float:
        """Sums the samples of `/metrics` with a name and labels."""
        answer = self.client.get("/metrics")
        assert answer.status_code == 200, answer.text
        return sum(
            sample.value
            for family in text_string_to_metric_families(answer.text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def learn(
        self,
        name: str,
        *,
        key: str = KEY,
        seed: int = 0,
        boxes: Mapping[str, int] | None = None,
        threshold: float = 0.0,
    ) -> Path:
        """Makes a version live, as a training does; answers the folder of its artefact."""
        torch.manual_seed(seed)
        detector = Detector.pretrained(preset_named("tiny", CPU), LABELS, "none", CPU)
        detector.thresholds = dict.fromkeys(LABELS, threshold)
        return make_live(self.backend, detector, name, key=key, label_config=CONFIG, boxes=boxes)


Serve = Callable[..., Served]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Makes a function that makes applications; all end with the test."""
    made: list[Served] = []

    def make(**settings: str) -> Served:
        made.append(Served(tmp_path / f"state-{len(made)}", **settings))
        return made[-1]

    yield make
    for served in made:
        served.close()


@pytest.fixture
def served(serve: Serve) -> Served:
    """Makes an application with default settings."""
    return serve()


@pytest.fixture(scope="module")
def unmoved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Makes one application for all requests that must leave nothing behind."""
    served = Served(tmp_path_factory.mktemp("unmoved"))
    yield served
    with served.backend.database.reading() as session:
        assert session.scalars(select(Project.key)).all() == []
    served.close()


def _image(seed: int = 0) -> str:
    """Makes an image of noise, in which an untrained detector finds something everywhere."""
    pixels = np.random.default_rng(seed).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _task(number: int, image: str | None = None) -> dict[str, Any]:
    return {"id": number, "data": {"image": _image(number) if image is None else image}}


def _labels(prediction: Mapping[str, Any]) -> set[str]:
    return {region["value"]["rectanglelabels"][0] for region in prediction["result"]}


def _annotated(number: int, *, key_time: str | None = None) -> dict[str, Any]:
    body = copy.deepcopy(capture("POST_webhook_ANNOTATION_CREATED"))
    body["annotation"] |= {"id": number, "task": number}
    body["task"]["id"] = number
    if key_time is not None:
        body["project"]["created_at"] = key_time
    return body


def _error(answer: TestResponse) -> str:
    """Reads the message of an error: whole in the JSON body, shortened in the reason phrase."""
    assert answer.json is not None, answer.text
    assert set(answer.json) == {"error"}
    message: str = answer.json["error"]
    phrase = answer.status.partition(" ")[2]
    assert phrase
    assert phrase in " ".join(message.split())
    return message


# Recorded requests


def test_create_app_registers_the_listed_endpoints(served: Served) -> None:
    found = {
        (method, rule.rule)
        for rule in served.app.url_map.iter_rules()
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
        if rule.endpoint != "static"
    }
    assert found == ENDPOINTS


def test_create_app_broken_extension_of_another_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    install_extension(CONTROLS, "circle", "no_such_package:Circle", site, monkeypatch)
    with pytest.raises(ExtensionError, match=r"control 'circle' of the package circle cannot be"):
        Served(tmp_path / "state")


@pytest.mark.parametrize("path", ["/health", "/"])
def test_health_running_server_is_up(served: Served, path: str) -> None:
    answer = served.client.get(path)
    assert answer.status_code == 200
    assert answer.json == {"status": "UP", "model_class": "ml_backend"}


def test_setup_and_predict_recorded_untrained_answer_the_same_version_and_empty_lists(
    served: Served,
) -> None:
    answer = served.post("/setup", capture("POST_setup"))
    assert answer.status_code == 200
    assert answer.json == {"model_version": "untrained"}
    answer = served.post("/predict", capture("POST_predict"))
    assert answer.status_code == 200
    assert answer.json == {"results": [[]], "model_version": "untrained"}
    project = served.project()
    assert (project.key, project.label_studio_id) == (KEY, 1)
    assert (project.url, project.token) == ("http://localhost:8090", "<token>")
    assert project.label_config == CONFIG


@pytest.mark.parametrize("name", sorted(path.stem for path in CAPTURES.glob("POST_webhook_*.json")))
def test_webhook_recorded_is_taken(served: Served, name: str) -> None:
    answer = served.post("/webhook", capture(name))
    assert answer.status_code == 200, answer.text
    assert served.project().heard_at is not None


def test_webhook_answers_how_many_annotations_changed(served: Served) -> None:
    created = capture("POST_webhook_ANNOTATION_CREATED")
    assert served.post("/webhook", created).json == {"status": "stored", "changed": 1}
    assert served.post("/webhook", created).json == {"status": "stored", "changed": 0}
    deleted = capture("POST_webhook_ANNOTATIONS_DELETED")
    assert served.post("/webhook", deleted).json == {"status": "stored", "changed": 1}


def test_webhook_other_action_is_ignored(served: Served) -> None:
    answer = served.post("/webhook", {"action": "LABEL_LINK_CREATED"})
    assert answer.status_code == 200
    assert answer.json == {"status": "ignored", "action": "LABEL_LINK_CREATED"}


def test_start_training_twice_makes_one_job_and_job_status_tells_its_reason(served: Served) -> None:
    refused = served.post("/webhook", capture("POST_webhook_START_TRAINING"))
    assert refused.status_code == 200
    assert refused.json is not None
    assert refused.json["status"] == "refused"
    assert "at least 2 annotated tasks and there are none" in refused.json["reason"]
    assert refused.json["reason_code"] == Code.TOO_FEW_ANNOTATED
    assert refused.json["reason_values"] == {"annotated": 0, "needed": 2}

    served.post("/webhook", capture("POST_webhook_ANNOTATIONS_CREATED"))
    queued = served.post("/webhook", capture("POST_webhook_START_TRAINING")).json
    assert queued is not None
    assert (queued["status"], queued["reason"]) == ("queued", "asked for, with 3 annotated tasks")
    assert queued["reason_code"] == Code.ASKED_FOR
    assert queued["reason_values"] == {"annotated": 3}
    again = served.post("/train", {"project": 1})
    assert again.status_code == 201
    assert again.json == queued
    job = served.backend.jobs.get(queued["job"])
    assert job is not None
    # One run of it is in the queue.
    assert job.run == 1

    for number in (queued["job"], str(queued["job"])):
        told = served.post("/job_status", {"job": number})
        assert told.status_code == 200
        assert told.json is not None
        assert (told.json["job"], told.json["kind"]) == (queued["job"], "train")
        assert told.json["job_status"] == "queued"
        for field in ("reason", "reason_code", "reason_values"):
            assert told.json[field] == queued[field]
    assert served.metric("ml_backend_jobs", kind="train", state="queued") == 1
    assert served.metric("ml_backend_jobs", kind="train", state="refused") == 1


@pytest.mark.parametrize("name", [KEY, "1", 1])
def test_train_key_or_id_finds_the_project(served: Served, name: str | int) -> None:
    assert served.version() == "untrained"
    answer = served.post("/train", {"project": name})
    assert answer.status_code == 409
    assert answer.json is not None
    assert answer.json["status"] == "refused"
    served.post("/webhook", capture("POST_webhook_ANNOTATIONS_CREATED"))
    assert served.post("/train", {"project": name}).status_code == 201


def test_train_too_few_known_annotations_and_label_studio_can_be_asked_starts_a_training(
    served: Served,
) -> None:
    # It brings an address and a token, with which the training reads back first.
    served.post("/setup", capture("POST_setup"))
    answer = served.post("/train", {"project": KEY})
    assert answer.status_code == 201
    assert answer.json is not None
    assert answer.json["status"] == "queued"
    assert (answer.json["reason_code"], answer.json["reason_values"]) == (
        Code.ASKED_FOR,
        {"annotated": 0},
    )


@pytest.mark.parametrize("path", ["/setup", "/predict"])
def test_setup_and_predict_id_alone_means_the_known_project_and_make_no_second(
    served: Served, path: str
) -> None:
    served.post("/webhook", capture("POST_webhook_ANNOTATIONS_CREATED"))
    body = {"project": "1", "schema": CONFIG, "label_config": CONFIG, "tasks": [_task(1)]}
    assert served.post(path, body).status_code == 200
    assert served.post("/train", {"project": "1"}).status_code == 201
    assert served.project().label_config == CONFIG
    with served.backend.database.reading() as session:
        assert session.scalars(select(Project.key)).all() == [KEY]


@pytest.mark.parametrize("path", ["/setup", "/predict"])
def test_setup_and_predict_id_of_several_label_studios_is_refused_with_their_keys(
    served: Served, path: str
) -> None:
    other = "1.1577836800"
    for key in (KEY, other):
        served.version(key=key)
    body = {"project": "1", "schema": CONFIG, "label_config": CONFIG, "tasks": [_task(1)]}
    answer = served.post(path, body)
    assert answer.status_code == 400
    assert f"{KEY}, {other}" in _error(answer)


def test_validate_usable_config_answers_its_labels(served: Served) -> None:
    for field in ("label_config", "config"):
        answer = served.post("/validate", {field: CONFIG})
        assert answer.status_code == 200
        assert answer.json == {"status": "ok", "labels": list(LABELS)}


@pytest.mark.parametrize("path", ["/duplicate_model", "/delete"])
def test_duplicate_model_and_delete_change_nothing(served: Served, path: str) -> None:
    served.learn("v1")
    answer = served.post(path, {"project": KEY})
    assert answer.status_code == 200
    assert answer.json is not None
    assert answer.json["status"] == "ok"
    assert served.version() == "v1"


def test_versions_lists_live_ones_first(served: Served) -> None:
    assert served.client.get("/versions").json == {"versions": ["untrained"]}
    for name in ("v1", "v2", "v3", "v4"):
        served.learn(name)
    served.backend.versions.rollback(served.project().id, to="v1")
    assert served.client.get("/versions").json == {"versions": ["v1", "v4", "v3", "v2"]}
    assert served.backend.versions.prune(served.project().id, 1) == ["v2"]
    assert served.client.get("/versions").json == {"versions": ["v1", "v4", "v3"]}


def test_metrics_live_version_shows_its_ap50(served: Served) -> None:
    served.learn("v1")
    assert served.metric("ml_backend_live_ap50", project=KEY, version="v1") == 0.5


def test_metrics_webhook_is_counted(served: Served) -> None:
    def count() -> tuple[float, float]:
        return (
            served.metric("ml_backend_webhooks_total", action="TASKS_DELETED"),
            served.metric(
                "ml_backend_request_seconds_count", endpoint="webhook.webhook", status="200"
            ),
        )

    before = count()
    served.post("/webhook", capture("POST_webhook_TASKS_DELETED"))
    assert count() == (before[0] + 1, before[1] + 1)


# Wrong requests


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/setup", {"project": KEY, "schema": NOTHING}),
        ("/predict", {"tasks": [{"id": 1}], "project": KEY, "label_config": NOTHING}),
        ("/validate", {"label_config": NOTHING}),
    ],
)
def test_label_config_nothing_to_detect_is_refused_with_what_is_missing(
    served: Served, path: str, body: dict[str, Any]
) -> None:
    answer = served.post(path, body)
    assert answer.status_code == 400
    # Label Studio shows of an error its reason phrase alone.
    assert answer.status.startswith("400 there is nothing to detect in this label config")
    assert "RectangleLabels" in answer.status
    assert "RectangleLabels" in _error(answer)


@pytest.mark.parametrize("path", READING)
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b"17",
        b"\xff\xfe\x00",
        b'{"project": NaN}',
        b'{"a": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
        b'{"a":' * 100_000,
    ],
    ids=lambda content: repr(content[:12]),
)
def test_endpoint_body_is_no_json_object_is_refused(
    unmoved: Served, path: str, content: bytes
) -> None:
    for kind in ("application/json", "text/plain"):
        answer = unmoved.client.post(path, data=content, content_type=kind)
        assert answer.status_code == 400, answer.text
        _error(answer)


@pytest.mark.parametrize(
    ("path", "body", "named"),
    [
        ("/setup", {}, "project"),
        ("/setup", {"project": 5, "schema": CONFIG}, "project"),
        ("/setup", {"project": None, "schema": CONFIG}, "project"),
        ("/setup", {"project": "one", "schema": CONFIG}, "project"),
        ("/setup", {"project": "1.2.3", "schema": CONFIG}, "project"),
        ("/setup", {"project": "9" * 30, "schema": CONFIG}, "project"),
        ("/setup", {"project": "\ud800", "schema": CONFIG}, "Unicode"),
        ("/setup", {"project": KEY}, "label config"),
        ("/setup", {"project": KEY, "schema": 5}, "schema"),
        ("/setup", {"project": KEY, "schema": "<View>"}, "label config"),
        ("/setup", {"project": KEY, "schema": "\ud800"}, "Unicode"),
        ("/setup", {"project": KEY, "schema": CONFIG, "hostname": 5}, "hostname"),
        ("/setup", {"project": KEY, "schema": CONFIG, "access_token": []}, "access_token"),
        ("/setup", {"project": KEY, "schema": CONFIG, "access_token": "\ud800"}, "Unicode"),
        ("/predict", {}, "tasks"),
        ("/predict", {"tasks": {"id": 1}}, "tasks"),
        ("/predict", {"tasks": ["1"]}, "tasks.0"),
        ("/predict", {"tasks": [{"id": 1}, {"id": "2"}]}, "tasks.1.id"),
        ("/predict", {"tasks": [{"id": 1.5}]}, "tasks.0.id"),
        ("/predict", {"tasks": [{"id": 1, "data": []}]}, "tasks.0.data"),
        ("/predict", {"tasks": [{"id": 1}]}, "project"),
        ("/predict", {"tasks": [{"id": 1}], "project": 1}, "project"),
        ("/predict", {"tasks": [{"id": 1}], "project": KEY}, f"project {KEY} is not known"),
        (
            "/predict",
            {"tasks": [{"id": 1}], "project": "x", "label_config": CONFIG},
            "project",
        ),
        ("/predict", {"tasks": [{"id": 1}], "project": KEY, "label_config": 1}, "label_config"),
        ("/webhook", {}, "action"),
        ("/webhook", {"action": 5}, "action"),
        ("/webhook", {"action": "START_TRAINING"}, "project"),
        ("/webhook", {"action": "START_TRAINING", "project": KEY}, "project"),
        ("/webhook", {"action": "START_TRAINING", "project": {"id": "1"}}, "project.id"),
        ("/webhook", {"action": "START_TRAINING", "project": {"id": 1}}, "project.created_at"),
        ("/validate", {}, "label config"),
        ("/validate", {"label_config": 5}, "config"),
        ("/validate", {"label_config": "<a>" * 10_000 + "</a>" * 10_000}, "label config"),
        ("/job_status", {}, "job"),
        ("/job_status", {"job": None}, "job"),
        ("/job_status", {"job": 999}, "no job 999"),
        ("/job_status", {"job": -1}, "no job -1"),
        ("/job_status", {"job": 10**30}, "no job 1000"),
        ("/job_status", {"job": "abc"}, "no job abc"),
        ("/train", {}, "project"),
        ("/train", {"project": None}, "project"),
        ("/train", {"project": "one"}, "project"),
        ("/train", {"project": "7"}, "project 7 is not known"),
        ("/train", {"project": 7}, "connect --project 7"),
        ("/train", {"project": -7}, "project"),
    ],
)
def test_endpoint_wrong_field_is_named(
    unmoved: Served, path: str, body: object, named: str
) -> None:
    answer = unmoved.post(path, body)
    assert 400 <= answer.status_code < 500, answer.text
    assert named in _error(answer)


@pytest.mark.parametrize(
    ("where", "value", "named"),
    [
        (("annotation",), None, "annotation"),
        (("annotation",), "1", "annotation"),
        (("annotation",), [5], "annotation"),
        (("annotation", "id"), "1", "annotation.id"),
        (("annotation", "id"), True, "annotation.id"),
        (("annotation", "id"), 2**63, "annotation.id"),
        (("annotation", "task"), None, "annotation.task"),
        (("annotation", "result"), None, "annotation.result"),
        (("annotation", "updated_at"), "yesterday", "annotation.updated_at"),
        (("annotation", "created_at"), 5, "annotation.created_at"),
        (("task",), None, "task"),
        (("task", "id"), -1, "task.id"),
        (("task", "data"), [], "task.data"),
        (("project",), [], "project"),
        (("project", "id"), None, "project.id"),
        (("project", "created_at"), "", "project.created_at"),
        (("project", "title"), "\ud800", "Unicode"),
        (("project", "label_config"), "\udfff", "Unicode"),
    ],
)
def test_webhook_wrong_field_is_named_and_nothing_is_stored(
    unmoved: Served, where: tuple[str, ...], value: object, named: str
) -> None:
    body = capture("POST_webhook_ANNOTATION_CREATED")
    inner = body
    for name in where[:-1]:
        inner = inner[name]
    inner[where[-1]] = value
    answer = unmoved.post("/webhook", body)
    assert answer.status_code == 400, answer.text
    assert named in _error(answer)
    with unmoved.backend.database.reading() as session:
        assert session.scalars(select(Project)).all() == []


def test_webhook_any_action_leaves_metrics_readable(served: Served) -> None:
    for action in ("\ud800", 'a"b\nc', "x" * 10_000):
        assert served.post("/webhook", {"action": action}).status_code < 500
    assert served.metric("ml_backend_webhooks_total") > 0


def test_unknown_path_or_method_is_answered_in_json(served: Served) -> None:
    missing = served.client.get("/nothing")
    assert missing.status_code == 404
    _error(missing)
    wrong = served.client.get("/predict")
    assert wrong.status_code == 405
    assert "POST" in wrong.headers["Allow"]
    _error(wrong)


def test_endpoint_body_over_the_limit_is_refused(serve: Serve) -> None:
    served = serve(ML_BACKEND_MAX_REQUEST_BYTES="2000")
    small = {"tasks": [_task(1, "x")], "project": KEY, "label_config": CONFIG}
    assert served.post("/predict", small).status_code == 200
    for path in READING:
        answer = served.post(path, {"tasks": [_task(1, "x" * 2000)], "action": "x"})
        assert answer.status_code == 413
        _error(answer)
    assert served.client.get("/health").status_code == 200


# Authentication


def test_basic_authentication_wrong_credentials_are_refused_except_by_health(serve: Serve) -> None:
    served = serve(BASIC_AUTH_USER="ann", BASIC_AUTH_PASS="sesame")
    assert served.client.get("/health").status_code == 200
    wrong: list[dict[str, str]] = [
        {},
        {"Authorization": _basic("ann", "wrong")},
        {"Authorization": _basic("bob", "sesame")},
        {"Authorization": _basic("", "")},
        {"Authorization": _basic("än", "sesäme")},
        {"Authorization": "Basic !!!"},
        {"Authorization": "Bearer sesame"},
        {"Authorization": "Token"},
        {SECRET_HEADER: ""},
    ]
    for method, path in [*sorted(ENDPOINTS - {("GET", "/health")}), ("GET", "/nothing")]:
        for headers in wrong:
            answer = served.client.open(path, method=method, headers=headers, json={})
            assert answer.status_code == 401, (path, headers)
            assert answer.headers["WWW-Authenticate"].startswith("Basic")
            assert "BASIC_AUTH_USER" in _error(answer)
        right = {"Authorization": _basic("ann", "sesame")}
        answer = served.client.open(path, method=method, headers=right, json={})
        assert answer.status_code not in (401, 403)
        assert answer.status_code < 500


@pytest.mark.parametrize("charset", ["utf-8", "latin-1"])
def test_basic_authentication_either_charset_is_accepted(serve: Serve, charset: str) -> None:
    served = serve(BASIC_AUTH_USER="änn", BASIC_AUTH_PASS="pa:ss wörd")
    right = {"Authorization": _basic("änn", "pa:ss wörd", charset)}
    assert served.client.get("/versions", headers=right).status_code == 200
    wrong = {"Authorization": _basic("änn", "pa:ss word", charset)}
    assert served.client.get("/versions", headers=wrong).status_code == 401


def _basic(user: str, password: str, charset: str = "utf-8") -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode(charset)).decode()


def test_webhook_wrong_secret_is_refused_and_nothing_is_stored(serve: Serve) -> None:
    served = serve(ML_BACKEND_WEBHOOK_SECRET="s3cret")
    body = capture("POST_webhook_ANNOTATION_CREATED")
    wrong: list[dict[str, str]] = [
        {},
        {SECRET_HEADER: "other"},
        {SECRET_HEADER: ""},
        {SECRET_HEADER: "s3cr\u00e9t"},
    ]
    for headers in wrong:
        answer = served.client.post("/webhook", json=body, headers=headers)
        assert answer.status_code == 401
        assert SECRET_HEADER in _error(answer)
    with served.backend.database.reading() as session:
        assert session.scalars(select(Project)).all() == []
    answer = served.client.post("/webhook", json=body, headers={SECRET_HEADER: "s3cret"})
    assert answer.json == {"status": "stored", "changed": 1}
    # The other endpoints do not ask for it.
    assert served.post("/setup", capture("POST_setup")).status_code == 200


def test_webhook_secret_is_good_for_no_other_endpoint(serve: Serve) -> None:
    served = serve(
        ML_BACKEND_WEBHOOK_SECRET="s3cret", BASIC_AUTH_USER="ann", BASIC_AUTH_PASS="sesame"
    )
    secret = {SECRET_HEADER: "s3cret"}
    body = capture("POST_webhook_ANNOTATION_CREATED")
    assert served.client.post("/webhook", json=body, headers=secret).status_code == 200
    setup = served.client.post("/setup", json=capture("POST_setup"), headers=secret)
    assert setup.status_code == 401
    password = {"Authorization": _basic("ann", "sesame")}
    assert served.client.post("/webhook", json=body, headers=password).status_code == 401


# Several projects


def test_projects_same_id_are_kept_apart_by_their_creation(served: Served) -> None:
    other = "1.1577836800"
    for number in (1, 2):
        served.post("/webhook", _annotated(number))
    served.post("/webhook", _annotated(1, key_time="2020-01-01T00:00:00Z"))
    served.learn("v1")
    assert served.version() == "v1"
    assert served.version(key=other) == "untrained"
    assert served.predict([_task(1)], key=other) == [[]]
    assert served.predict([_task(1)])[0]["model_version"] == "v1"

    ambiguous = served.post("/train", {"project": 1})
    assert ambiguous.status_code == 400
    message = _error(ambiguous)
    assert KEY in message
    assert other in message
    assert served.post("/train", {"project": other}).status_code == 409
    assert served.post("/train", {"project": KEY}).status_code == 201


# Predictions


def test_predict_untrained_thousands_of_tasks_get_as_many_empty_lists(served: Served) -> None:
    tasks = [_task(number, f"/data/upload/1/{number}.jpg") for number in range(5000)]
    assert served.predict(tasks) == [[]] * 5000


def test_predict_no_task_answers_no_result(served: Served) -> None:
    answer = served.post("/predict", {"tasks": [], "project": KEY, "label_config": CONFIG})
    assert answer.status_code == 200
    assert answer.json == {"results": []}


def test_predict_trained_version_is_the_one_that_setup_answers(served: Served) -> None:
    served.learn("v1")
    assert served.version() == "v1"
    before = served.metric("ml_backend_predicted_tasks_total")
    tasks = [_task(number) for number in range(1, 31)]
    results = served.predict(tasks)
    assert served.metric("ml_backend_predicted_tasks_total") == before + 30
    for result in results:
        assert result["model_version"] == served.version()
        assert 0 <= result["score"] <= 1
        assert result["result"]
        for region in result["result"]:
            assert region["type"] == "rectanglelabels"
            assert (region["from_name"], region["to_name"]) == ("label", "image")
            assert (region["original_width"], region["original_height"]) == (64, 48)
            value = region["value"]
            assert value["rectanglelabels"][0] in LABELS
            assert 0 <= value["x"] < value["x"] + value["width"] <= 100.001
            assert 0 <= value["y"] < value["y"] + value["height"] <= 100.001
            assert 0 <= region["score"] <= 1
    # In the order of the tasks: each alone gets what it got among the others.
    for index in (0, 17, 29):
        alone = served.predict([tasks[index]])[0]
        boxes = [r["value"]["x"] for r in alone["result"]]
        assert boxes == pytest.approx([r["value"]["x"] for r in results[index]["result"]], abs=0.01)


def test_predict_known_project_needs_no_config(served: Served) -> None:
    served.learn("v1")
    answer = served.post("/predict", {"tasks": [_task(1)], "project": "1"})
    assert answer.status_code == 200
    assert answer.json is not None
    assert answer.json["results"][0]["model_version"] == "v1"


def test_predict_unreadable_image_leaves_only_its_own_task_empty(served: Served) -> None:
    served.learn("v1")
    damaged = "data:image/png;base64," + base64.b64encode(b"this is no image").decode()
    truncated = _image(1)[:-400]
    tasks = [
        _task(1),
        _task(2, damaged),
        _task(3),
        _task(4, truncated),
        {"id": 5, "data": {}},
        {"id": 6, "data": {"image": 17}},
        {"id": 7},
        _task(8, "data:image/png;base64,???"),
        _task(9, "/data/upload/1/nowhere.png"),
        _task(10),
    ]
    before = served.metric("ml_backend_image_failures_total")
    results = served.predict(tasks)
    assert served.metric("ml_backend_image_failures_total") == before + 7
    assert [bool(result) for result in results] == [task["id"] in (1, 3, 10) for task in tasks]
    assert [result for result in results if not result] == [[]] * 7
    assert all(result["result"] for result in results if result)


def test_predict_score_threshold_of_the_config_hides_lower_scores(served: Served) -> None:
    served.learn("v1")
    scores = sorted(region["score"] for region in served.predict([_task(1)])[0]["result"])
    middle = round((scores[0] + scores[-1]) / 2, 6)
    config = CONFIG.replace(
        "<RectangleLabels", f'<RectangleLabels model_score_threshold="{middle}"'
    )
    shown = [r["score"] for r in served.predict([_task(1)], config=config)[0]["result"]]
    assert sorted(shown) == [score for score in scores if score >= middle]
    assert 0 < len(shown) < len(scores)
    # Nothing above it is an answer, too: a prediction without a box.
    strict = CONFIG.replace("<RectangleLabels", '<RectangleLabels model_score_threshold="1"')
    nothing = served.predict([_task(1)], config=strict)[0]
    assert nothing["result"] == []
    assert nothing["model_version"] == "v1"


def test_predict_score_threshold_of_the_config_replaces_the_learned_one(served: Served) -> None:
    served.learn("v1", threshold=0.99)
    assert served.predict([_task(1)])[0]["result"] == []
    low = CONFIG.replace("<RectangleLabels", '<RectangleLabels model_score_threshold="0"')
    assert served.predict([_task(1)], config=low)[0]["result"]


@pytest.mark.parametrize(
    "config",
    [CONFIG, CONFIG.replace("<RectangleLabels", '<RectangleLabels model_score_threshold="0"')],
)
def test_predict_label_without_training_boxes_is_never_predicted(
    served: Served, config: str
) -> None:
    tasks = [_task(number) for number in range(1, 6)]
    served.learn("v1", boxes={"RBC": 5, "WBC": 5, "Platelets": 5})
    served.learn("v2", key="2.1795463889", boxes={"RBC": 5, "WBC": 0})
    everything = served.predict(tasks, config=config)
    assert set().union(*map(_labels, everything)) == set(LABELS)
    seen = served.predict(tasks, config=config, key="2.1795463889")
    assert set().union(*map(_labels, seen)) == {"RBC"}


def test_predict_label_removed_from_the_config_is_not_predicted(served: Served) -> None:
    served.learn("v1")
    config = CONFIG.replace('<Label value="WBC"/>', '<Label value="New"/>')
    results = served.predict([_task(1), _task(2)], config=config)
    assert set().union(*map(_labels, results)) == {"RBC", "Platelets"}


def test_predict_damaged_live_version_is_replaced_by_the_one_before(served: Served) -> None:
    served.learn("v1", seed=1)
    served.learn("v2", seed=2)
    weights = served.learn("v3", seed=3) / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    result = served.predict([_task(1)])[0]
    assert result["model_version"] == "v2"
    assert result["result"]
    # What predicts is what setup tells, or predictions would pile up.
    assert served.version() == "v2"


def test_predict_replacement_of_a_damaged_version_is_loaded_once(served: Served) -> None:
    other = "2.1795463889"
    served.learn("v1")
    weights = served.learn("v2") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    served.predict([_task(1)])
    with served.backend.models.using(served.project()) as standing_in:
        pass
    # Once the other project's promotion is followed, this one's was looked at as well.
    served.learn("w1", key=other)
    assert served.predict([_task(1)], key=other)[0]["model_version"] == "w1"
    served.learn("w2", key=other)
    wait_for(lambda: served.version(key=other) == "w2", within=30, what="w2 serves")
    with served.backend.models.using(served.project()) as still:
        assert still is standing_in


def test_predict_every_version_damaged_answers_empty_lists(served: Served) -> None:
    weights = served.learn("v1") / "model.safetensors"
    weights.unlink()
    assert served.predict([_task(1), _task(2)]) == [[], []]


def test_predict_tasks_past_the_deadline_become_a_job(serve: Serve) -> None:
    served = serve(ML_BACKEND_PREDICT_DEADLINE="0.001")
    served.learn("v1")
    before = served.metric("ml_backend_left_over_tasks_total")
    tasks = [_task(number) for number in range(1, 31)]
    assert served.predict(tasks) == [[]] * 30
    assert served.metric("ml_backend_left_over_tasks_total") == before + 30
    (job,) = served.jobs("predict")
    assert job.state == "queued"
    claimed = served.backend.jobs.claim(job.id, job.run, "here")
    assert claimed is not None
    assert claimed.payload == {"tasks": tasks}
    told = served.post("/job_status", {"job": job.id}).json
    assert told is not None
    assert (told["kind"], told["job_status"]) == ("predict", "running")
    assert told["reason"].startswith("30 tasks left over")
    assert told["reason_code"] == Code.REQUEST_LEFT_TASKS
    assert told["reason_values"] == {"tasks": 30}


def test_predict_tasks_past_the_deadline_without_an_id_make_no_job(serve: Serve) -> None:
    served = serve(ML_BACKEND_PREDICT_DEADLINE="0.001")
    served.learn("v1")
    assert served.predict([{"data": {"image": _image()}}]) == [[]]
    assert served.jobs("predict") == []


def test_predict_promotion_under_load_fails_no_request_and_all_switch(served: Served) -> None:
    served.learn("v1", seed=1)
    seen: list[list[tuple[int, str, int]]] = [[] for _ in range(4)]
    started = threading.Barrier(5)
    switched = threading.Event()

    def ask(number: int) -> None:
        client = served.app.test_client()
        body = {"tasks": [_task(number)], "project": KEY, "label_config": CONFIG}
        started.wait()
        while not switched.is_set():
            answer = client.post("/predict", json=body)
            result = answer.json["results"][0] if answer.json else {}
            version, boxes = result.get("model_version", ""), len(result.get("result", ()))
            seen[number].append((answer.status_code, version, boxes))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    started.wait()
    try:
        wait_for(lambda: all(seen), within=30, what="every thread is answered")
        served.learn("v2", seed=2)
        wait_for(lambda: all(s[-1][1] == "v2" for s in seen), within=30, what="v2 serves")
    finally:
        switched.set()
        for thread in threads:
            thread.join()
    for answers in seen:
        assert {status for status, _, _ in answers} == {200}
        assert all(boxes > 0 for _, _, boxes in answers)
        versions = [version for _, version, _ in answers]
        assert set(versions) == {"v1", "v2"}
        assert versions == sorted(versions)
    assert served.version() == "v2"


def test_predict_after_a_rollback_answers_with_the_version_before(served: Served) -> None:
    served.learn("v1", seed=1)
    served.learn("v2", seed=2)
    assert served.predict([_task(1)])[0]["model_version"] == "v2"
    served.backend.versions.rollback(served.project().id)
    wait_for(lambda: served.version() == "v1", within=30, what="v1 serves again")
    assert served.predict([_task(1)])[0]["model_version"] == "v1"
