"""Test connections that were added by hand, and Label Studio under its browsers' address."""

from __future__ import annotations

import http.server
import json
import shlex
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ml_backend.backend import Backend
from ml_backend.demo.label_studio_server import LabelStudioServer
from ml_backend.demo.project import LABEL_CONFIG, create_project
from ml_backend.demo.shapes import SHAPES, generate
from ml_backend.detection.detector import Detector
from ml_backend.detection.presets import preset_named
from ml_backend.label_studio.client import LabelStudioClient
from ml_backend.settings import load_settings
from ml_backend.store.tables import Project
from tests.conftest import RunningBackend, ask, make_live

BROWSERS = "http://label-studio.example:8080"


class _OtherModel(http.server.BaseHTTPRequestHandler):
    """Answers as another ML backend; `seen` holds the Authorization of each request."""

    seen: list[str | None]

    def do_GET(self) -> None:
        self._answer({"status": "UP"})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._answer({"model_version": "sam-2"})

    def _answer(self, content: dict[str, str]) -> None:
        self.seen.append(self.headers.get("Authorization"))
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


@pytest.fixture
def other_model() -> Iterator[tuple[str, list[str | None]]]:
    """Runs another ML backend; gives its address and the credentials that it received."""
    seen: list[str | None] = []
    handler = type("Handler", (_OtherModel,), {"seen": seen})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", seen
    server.shutdown()


class Site:
    """Holds a project with a live version, for which nobody ran `connect`."""

    def __init__(self, server: LabelStudioServer, folder: Path) -> None:
        self.server = server
        self.image = generate(1, seed=3, width=128, height=96)[0]
        self.project, tasks = create_project(
            server, "By hand", LABEL_CONFIG, {self.image.name: self.image.encoded()}
        )
        self.task = tasks[self.image.name]
        self.running = RunningBackend(
            folder,
            LABEL_STUDIO_URL=server.url,
            LABEL_STUDIO_API_KEY=server.login.token,
            ML_BACKEND_AUTO_LABEL="false",
        )
        self.key = LabelStudioClient(server.url, server.login.token).project(self.project).key
        self.learn("v1")

    def backend(self) -> Backend:
        """Makes the backend of the present settings."""
        return Backend(load_settings(self.running.settings))

    def learn(self, name: str) -> None:
        """Makes a version live, as a training does."""
        cpu = torch.device("cpu")
        detector = Detector.pretrained(preset_named("tiny", cpu), SHAPES[:3], "none", cpu)
        make_live(self.backend(), detector, name, key=self.key, label_config=LABEL_CONFIG)

    def row(self) -> Project:
        """Reads the row of the project."""
        with self.backend().database.reading() as session:
            return session.query(Project).filter_by(key=self.key).one()

    def follow(self) -> None:
        """Updates the connection's title, as the worker does after a promotion."""
        assert self.backend().connection_title.update(self.row().id)

    def call(self, method: str, path: str, body: object = None) -> Any:
        """Sends a request to Label Studio's API; answers its JSON."""
        return ask(self.server, method, path, body)

    def add(self, url: str, title: str, **fields: str) -> None:
        """Adds a connection, as Label Studio's page does."""
        body = {"url": url, "title": title, "project": self.project, **fields}
        self.call("POST", "/api/ml", body)

    def titles(self) -> dict[str, str]:
        """Reads the titles of its connections, by address."""
        return {c["url"]: c["title"] for c in self.call("GET", f"/api/ml?project={self.project}")}

    def findings(self, status: int) -> dict[str, dict[str, str]]:
        """Runs `doctor`; gives its findings by the thing examined."""
        found = self.running.json("doctor", "--project", str(self.project), status=status)
        return {f["what"]: f for f in found}


@pytest.fixture
def site(label_studio: LabelStudioServer, tmp_path: Path) -> Iterator[Site]:
    """Makes a project for each test."""
    made = Site(label_studio, tmp_path)
    yield made
    made.running.stop()


def test_connect_other_backends_connection_is_not_changed(
    site: Site, other_model: tuple[str, list[str | None]]
) -> None:
    url, seen = other_model
    site.add(url, "untrained")
    site.running.settings |= {"BASIC_AUTH_USER": "ann", "BASIC_AUTH_PASS": "sesame"}
    site.follow()
    assert site.titles() == {url: "untrained"}
    site.running.start()
    assert site.findings(1)["connection"]["detail"] == "the project is not connected"
    assert site.titles() == {url: "untrained"}
    assert set(seen) == {None}


def test_connection_added_by_hand_gets_the_title_and_connect_repairs_it(site: Site) -> None:
    running = site.running
    # Not the address that the settings have: what it answers says whose it is.
    url = running.url.replace("127.0.0.1", "127.0.0.2")
    running.settings |= {"HOST": "0.0.0.0", "BASIC_AUTH_USER": "ann", "BASIC_AUTH_PASS": "sesame"}
    running.start()
    site.add(
        url,
        "My model",
        auth_method="BASIC_AUTH",
        basic_auth_user="ann",
        basic_auth_pass="sesame",
    )
    findings = site.findings(1)
    assert findings["connection"]["status"] == "warning"
    assert "'My model'" in findings["connection"]["detail"]
    # The webhook that Label Studio makes for it by itself has no credentials, ever.
    assert "lacks the credentials or the secret" in findings["webhook"]["detail"]
    site.follow()
    assert site.titles() == {url: "v1"}

    # Credentials that it cannot have are missing, and it gets them from `connect` alone.
    running.stop()
    running.settings |= {"BASIC_AUTH_USER": "bob", "ML_BACKEND_WEBHOOK_SECRET": "open sesame"}
    site.learn("v2")
    running.start()
    site.follow()
    assert site.titles() == {url: "v1"}
    findings = site.findings(1)
    assert "by hand, and lacks the credentials" in findings["connection"]["detail"]
    assert "lacks the credentials or the secret" in findings["webhook"]["detail"]
    remedy = findings["connection"]["remedy"]
    assert remedy == f"ml-backend connect --project {site.project} --url {url}"
    running.command(*shlex.split(remedy)[1:])
    assert site.titles() == {url: "v2"}
    findings = site.findings(0)
    assert {findings[what]["status"] for what in ("connection", "webhook")} == {"ok"}


def test_predict_image_address_for_browsers_is_read_from_label_studios_known_address(
    site: Site,
) -> None:
    (upload,) = site.call("GET", f"/api/tasks/{site.task}/")["data"].values()
    # As LABEL_STUDIO_HOST makes it: the address stands in tasks, and in `/setup`.
    project = site.backend().ingest.introduce(
        site.key, site.project, label_config=LABEL_CONFIG, url=BROWSERS
    )
    images = site.backend().label_studios.images(project)
    assert images.fetch(site.task, BROWSERS + upload) == site.image.encoded()
    assert images.route_of(BROWSERS + upload) == "an upload, from Label Studio"


def test_doctor_project_without_a_version_lists_the_labels_that_coco_knows(
    label_studio: LabelStudioServer, tmp_path: Path
) -> None:
    config = LABEL_CONFIG.replace(
        '"Circle"/>', '"Circle" predicted_values="frisbe"/><Label value="car"/>'
    )
    project, _ = create_project(label_studio, "Coco", config, {})
    (tmp_path / "weights").write_text("none that fit")
    running = RunningBackend(
        tmp_path,
        LABEL_STUDIO_URL=label_studio.url,
        LABEL_STUDIO_API_KEY=label_studio.login.token,
        ML_BACKEND_PRESET="small",
        ML_BACKEND_WEIGHTS=str(tmp_path / "weights"),
    )
    found = {f["what"]: f for f in running.json("doctor", "-p", str(project), status=1)}
    known = found["known labels"]
    assert known["status"] == "warning"
    assert known["detail"].startswith("COCO's weights know car; they do not know Circle, ")
    assert "frisbe: did you mean frisbee?" in known["detail"]
    assert "predicted_values" in known["remedy"]
