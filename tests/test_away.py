"""A Label Studio that fails: jobs that need it wait with a reason, and end once it is back."""

from __future__ import annotations

import select
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from sqlalchemy import select as select_rows
from sqlalchemy import update

from ml_backend.backend import Backend
from ml_backend.demo.label_studio_server import LabelStudioServer, free_port
from ml_backend.demo.project import LABEL_CONFIG, annotate, create_project
from ml_backend.demo.shapes import SHAPES, ShapeImage, generate
from ml_backend.detection.detector import Detector
from ml_backend.detection.presets import preset_named
from ml_backend.doctor.doctor import Doctor
from ml_backend.doctor.finding import Finding
from ml_backend.http.app import create_app
from ml_backend.label_studio import client as client_module
from ml_backend.label_studio import transport as transport_module
from ml_backend.label_studio.client import LabelStudioClient
from ml_backend.label_studio.errors import Passing, Unauthorized, Unreachable
from ml_backend.projects.reconcile import reconcile
from ml_backend.settings import load_settings
from ml_backend.store.states import JobState
from ml_backend.store.tables import Contact, Job, Project, now
from ml_backend.wording import words
from tests import stand_in
from tests.conftest import ask, capture, make_live, predictions_held, wait_for
from tests.job_process import run_job
from tests.steps import Steps

ANSWERS = {
    "500": ("500 Internal Server Error", "text/plain", "boom"),
    "401": ("401 Unauthorized", "application/json", '{"detail": "Invalid token."}'),
    "HTML": ("200 OK", "text/html", "<html>Down for maintenance</html>"),
}
SAID = {
    "refused": ("unreachable", "does not answer"),
    "silent": ("unreachable", "does not answer"),
    "500": ("failed", "failed with status 500"),
    "401": ("unauthorized", "does not take the legacy token"),
    "HTML": ("bad answer", "text/html instead of JSON"),
}
"""For each way to fail: its kind in `/metrics`, and a part of the reason."""


class Proxy:
    """Stand in front of Label Studio: pass everything on, or fail in a given way.

    Args:
        port: the port of Label Studio.
    """

    def __init__(self, port: int) -> None:
        self._upstream = port
        self._port = free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        self._listener: socket.socket | None = None
        self._open: set[socket.socket] = set()
        self._how = ""
        self.become("through")

    def become(self, how: str) -> None:
        """Switch to a way to answer.

        Args:
            how: `through`, `refused`, `silent`, `drip`, or one of `ANSWERS`.
        """
        self._how = how
        if self._listener is not None:
            with suppress(OSError):
                # Closing alone would not end a waiting `accept`.
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None
        for connection in list(self._open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        if how != "refused":
            self._listener = socket.create_server(("127.0.0.1", self._port), backlog=64)
            threading.Thread(target=self._take, args=(self._listener,), daemon=True).start()

    def _take(self, listener: socket.socket) -> None:
        while True:
            try:
                connection = listener.accept()[0]
            except OSError:
                return
            self._open.add(connection)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):
            if self._how == "through":
                self._pass_on(connection)
            elif self._how == "silent":
                while connection.recv(65536):
                    """Read everything and send nothing."""
            elif self._how == "drip":
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 200 OK\r\nX: ")
                while True:
                    connection.sendall(b"x")
                    time.sleep(0.1)
            else:
                connection.recv(65536)
                status, kind, body = ANSWERS[self._how]
                head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nConnection: close\r\n"
                connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        self._open.discard(connection)

    def _pass_on(self, connection: socket.socket) -> None:
        with socket.create_connection(("127.0.0.1", self._upstream)) as upstream:
            other = {connection: upstream, upstream: connection}
            while True:
                for ready in select.select(list(other), [], [])[0]:
                    if not (part := ready.recv(65536)):
                        return
                    other[ready].sendall(part)


@pytest.fixture
def proxy(label_studio: LabelStudioServer) -> Iterator[Proxy]:
    """Return a proxy in front of the real Label Studio."""
    stands = Proxy(label_studio.port)
    yield stands
    stands.become("refused")


class Site:
    """Use a project in Label Studio, and a backend that reaches it through a proxy."""

    def __init__(
        self, server: LabelStudioServer, proxy: Proxy, folder: Path, images: list[ShapeImage]
    ) -> None:
        self.server = server
        number, tasks = create_project(
            server, "Away", LABEL_CONFIG, {i.name: i.encoded() for i in images}
        )
        self.number = number
        self.images = {tasks[i.name]: i for i in images}
        self.settings = {
            "MODEL_DIR": str(folder),
            "LABEL_STUDIO_URL": proxy.url,
            "LABEL_STUDIO_API_KEY": server.login.token,
            "ML_BACKEND_PRESET": stand_in.REFERENCE,
            "ML_BACKEND_WEIGHTS": "none",
            "ML_BACKEND_DEVICE": "cpu",
            "ML_BACKEND_TRAIN_THREADS": "1",
            "ML_BACKEND_IMAGE_TIMEOUT": "1",
        }
        self.backend = Backend(load_settings(self.settings))
        self.key = LabelStudioClient(server.url, server.login.token).project(number).key
        self.row = self.backend.ingest.introduce(self.key, number, label_config=LABEL_CONFIG).id

    @property
    def project(self) -> Project:
        """The project's row in the database."""
        with self.backend.database.reading() as session:
            return session.get_one(Project, self.row)

    def promote(self, version: str) -> None:
        """Make a version live."""
        cpu = torch.device("cpu")
        preset = preset_named(stand_in.REFERENCE, cpu)
        detector = Detector.pretrained(preset, SHAPES[:3], "none", cpu)
        make_live(self.backend, detector, version, key=self.key, label_config=LABEL_CONFIG)

    def job(self, number: int) -> Job:
        """Return a job, which must exist."""
        job = self.backend.jobs.get(number)
        assert job is not None
        return job

    def assert_waits(self, number: int, how: str) -> None:
        """Check that a job waits with a reason, and that the failure costs it no attempt."""
        job = self.job(number)
        assert (job.state, job.attempt) == (JobState.QUEUED, 0), job.reason
        assert SAID[how][1] in words(job.reason)
        assert job.not_before is not None
        assert job.not_before > now() + timedelta(seconds=20)

    def findings(self) -> dict[str, Finding]:
        """Run `doctor` with a client that remembers no earlier failure; return its findings."""
        again = Backend(load_settings(self.settings))
        doctor = Doctor(again.settings, again.database, again.artefacts, again.label_studios)
        return {finding.what: finding for finding in doctor.examine(self.number)}


def _shorten_timeouts() -> None:
    client_module._QUICK_TIMEOUT = transport_module._TIMEOUT = (1, 1)


def _run_job(job: int) -> int:
    _shorten_timeouts()
    return run_job(job)


@pytest.fixture
def short_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the client wait one second instead of a minute."""
    monkeypatch.setattr(transport_module, "_TIMEOUT", (1, 1))
    monkeypatch.setattr(client_module, "_QUICK_TIMEOUT", (1, 1))


def test_jobs_label_studio_fails_wait_with_a_reason_and_end_once_it_is_back(
    label_studio: LabelStudioServer, proxy: Proxy, tmp_path: Path, short_timeouts: None
) -> None:
    site = Site(label_studio, proxy, tmp_path, generate(8, seed=61, width=128, height=96, most=2))
    served = create_app(site.backend).test_client()
    annotated = dict(list(site.images.items())[:4])
    annotate(label_studio, annotated)
    # Runs a job whether or not its delay is over.
    run = Steps(site.settings, _run_job)
    # The project and its annotations are known, as after webhooks.
    client = site.backend.label_studios.client(site.project)
    assert client is not None
    reconcile(site.project, client, site.backend.database, site.backend.ingest)
    training = site.backend.requests.training(site.row, forced=True).job

    for number, how in enumerate(SAID, 1):
        site.promote(f"v{number}")
        asked = site.backend.requests.autolabel(site.row)
        assert asked is not None
        proxy.become(how)
        for job in (asked.job, training):
            run.count(job)
            site.assert_waits(job, how)

        # Metrics and `doctor` tell the kind and the reason.
        kind, words = SAID[how]
        line = f'label_studio_failing_seconds{{failure="{kind}",url="{proxy.url}"}}'
        assert line in served.get("/metrics").text
        found = site.findings()
        assert words in found["requests"].reason.values["detail"]
        about = found["token" if how == "401" and "token" in found else "Label Studio"]
        assert about.status == "error"

        # Webhooks are stored meanwhile.
        body = capture("POST_webhook_ANNOTATION_CREATED")
        body["annotation"]["id"] = 1_000_000 + number
        assert served.post("/webhook", json=body).json == {"status": "stored", "changed": 1}

        proxy.become("through")
        run.count(asked.job)
        assert site.job(asked.job).state == JobState.DONE
        gauge = f'label_studio_failing_seconds{{failure="",url="{proxy.url}"}} 0.0'
        assert gauge in served.get("/metrics").text
        assert "requests" not in site.findings()

    run.count(training)
    trained = site.job(training)
    assert (trained.state, trained.attempt) == (JobState.DONE, 1), trained.reason
    assert trained.version is not None
    assert "-4tasks-" in trained.version
    held = predictions_held(label_studio, site.number)
    rest = [task for task in site.images if task not in annotated]
    assert held == Counter((task, f"v{n}") for task in rest for n in range(1, len(SAID) + 1))


def test_client_silent_label_studio_waits_for_it_once(proxy: Proxy, short_timeouts: None) -> None:
    client = LabelStudioClient(proxy.url, "0" * 40)
    proxy.become("silent")
    with pytest.raises(Unreachable, match="does not answer"):
        client.whoami()
    # The next request fails at once.
    with pytest.raises(Unreachable, match="asked again in"):
        client.whoami()
    proxy.become("through")
    # After the pause Label Studio answers again, and refuses the token.
    wait_for(lambda: _is_refused(client), within=20, what="the pause is over", every=0.1)
    with pytest.raises(Unauthorized):
        client.whoami()


def _is_refused(client: LabelStudioClient) -> bool:
    """Ask once; return whether the token was refused, instead of no answer."""
    with pytest.raises((Unauthorized, Unreachable)) as raised:
        client.whoami()
    return raised.type is Unauthorized


def test_client_answer_of_single_bytes_gives_up_at_twice_the_timeout(
    proxy: Proxy, short_timeouts: None
) -> None:
    client = LabelStudioClient(proxy.url, "0" * 40)
    proxy.become("drip")
    begun = time.monotonic()
    with pytest.raises(Passing):
        client.whoami()
    # Twice the timeout is 2 s; the rest is for a busy machine.
    assert time.monotonic() - begun < 8


def test_predict_page_instead_of_an_image_is_not_cached(
    label_studio: LabelStudioServer, proxy: Proxy, tmp_path: Path
) -> None:
    site = Site(label_studio, proxy, tmp_path, generate(1, seed=62, width=128, height=96))
    site.promote("v1")
    served = create_app(site.backend).test_client()
    (task,) = site.images
    shown = ask(label_studio, "GET", f"/api/tasks/{task}/")
    body = {
        "tasks": [{"id": task, "data": shown["data"]}],
        "project": site.key,
        "label_config": LABEL_CONFIG,
    }
    for how in SAID:
        proxy.become(how)
        answer = served.post("/predict", json=body)
        assert (answer.status_code, (answer.json or {})["results"]) == (200, [[]])
    proxy.become("through")
    answer = served.post("/predict", json=body)
    assert (answer.json or {})["results"][0]["model_version"] == "v1"


def test_contacts_long_failure_waits_longer_between_requests(tmp_path: Path) -> None:
    site = Backend(load_settings({"MODEL_DIR": str(tmp_path)}))
    contacts = site.label_studios.connectivity
    contacts.note("http://there", Unreachable("it does not answer"))
    with site.database.reading() as session:
        assert session.scalars(select_rows(Contact.failure)).one() == "unreachable"
    waits = []
    for minutes in (0, 3, 60):
        with site.database.session() as session:
            session.execute(
                update(Contact).values(failing_since=now() - timedelta(minutes=minutes))
            )
        waits.append(contacts.wait("http://there"))
    assert waits == pytest.approx([30, 180, 600], abs=1)
