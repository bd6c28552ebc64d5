"""What the tests stand on: a real Label Studio, and the backend started as a user starts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import requests
from hypothesis import settings

from ml_backend.backend import Backend
from ml_backend.demo.label_studio_server import (
    LabelStudioServer,
    free_port,
    wait_until_healthy,
)
from ml_backend.detection.detector import Detector
from ml_backend.reasons import Code, reason
from ml_backend.settings import load_settings
from ml_backend.training.promotion import Verdict
from tests.distributed import PostgreSQL, running_postgresql

ROOT = Path(__file__).parents[1]
CAPTURES = Path(__file__).parent / "captures"

# Consoles take their size from these when they are made; tests set it when they run a command.
for _name in ("COLUMNS", "LINES"):
    os.environ.pop(_name, None)

# The same examples each time, so that a change is judged by itself; `--hypothesis-profile default`
# explores.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")


def capture(name: str) -> dict[str, Any]:
    """The body of a request that a real Label Studio 1.23.2 sent: `POST_setup`, for example."""
    content = json.loads((CAPTURES / f"{name}.json").read_text())
    body: dict[str, Any] = content["body"]
    return body


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """A developer's own settings stay out of the tests."""
    for name in list(os.environ):
        if name.startswith(("ML_BACKEND_", "LABEL_STUDIO_", "BASIC_AUTH_")) or name in {
            "MODEL_DIR",
            "DATABASE_URL",
            "HOST",
            "PORT",
            "WORKERS",
            "THREADS",
        }:
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def label_studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabelStudioServer]:
    """A real Label Studio, one for the whole run; each test makes a project of its own."""
    folder = tmp_path_factory.mktemp("label-studio")
    with LabelStudioServer(label_studio_program(), folder) as server:
        yield server


def label_studio_program() -> Path:
    """Label Studio's program, from an environment of its own."""
    program = Path(
        os.environ.get("TEST_LABEL_STUDIO", ROOT / ".venv-label-studio/bin/label-studio")
    )
    if not program.is_file():
        pytest.fail(f"there is no {program}: `make test` installs Label Studio")
    return program


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgreSQL]:
    """A PostgreSQL server, one for the whole run; each test empties its database first."""
    with running_postgresql() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Address of an empty database, as the settings give it: a test runs on each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'test.db'}"
    server: PostgreSQL = request.getfixturevalue("postgresql")
    server.empty()
    return load_settings({"DATABASE_URL": server.url}).database


def ask(
    server: LabelStudioServer, method: str, path: str, body: object = None, **params: str
) -> Any:
    """One request to Label Studio's API, as the user who owns its projects."""
    answer = requests.request(
        method,
        f"{server.url}{path}",
        headers={"Authorization": f"Token {server.login.token}"},
        json=body,
        params=params,
        timeout=200,
    )
    assert answer.ok, f"{method} {path}: {answer.status_code} {answer.text[:500]}"
    return answer.json() if answer.content else None


def predictions_held(server: LabelStudioServer, project: int) -> Counter[tuple[int, str]]:
    """How many predictions Label Studio holds of each task, by each version."""
    found = ask(server, "GET", f"/api/predictions/?project={project}")
    return Counter((p["task"], p["model_version"]) for p in found)


def predictions_by_task(server: LabelStudioServer, project: int) -> dict[int, Counter[str]]:
    """The same, task by task."""
    found: dict[int, Counter[str]] = {}
    for (task, version), count in predictions_held(server, project).items():
        found.setdefault(task, Counter())[version] = count
    return found


class RunningBackend:
    """`ml-backend serve`, as a user starts it, with settings of one's own.

    Args:
        folder: `MODEL_DIR` below it, and the log.
        settings: more settings.
    """

    def __init__(self, folder: Path, **settings: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / "backend.log"
        self.model_dir = folder / "state"
        self.settings = {
            "HOST": "127.0.0.1",
            "PORT": str(self.port),
            "MODEL_DIR": str(self.model_dir),
            "ML_BACKEND_PRESET": "tiny",
            "ML_BACKEND_WEIGHTS": "none",
            "ML_BACKEND_DEVICE": "cpu",
            **settings,
        }
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def environment(self) -> dict[str, str]:
        """The environment in which its commands run."""
        return {**os.environ, **self.settings}

    @property
    def auth(self) -> tuple[str, str] | None:
        """Its basic authentication."""
        if "BASIC_AUTH_USER" not in self.settings:
            return None
        return self.settings["BASIC_AUTH_USER"], self.settings["BASIC_AUTH_PASS"]

    @property
    def pid(self) -> int:
        """Of `ml-backend serve`."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Starts it and waits until it answers."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "ml_backend.cli", "serve"],
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.log.parent,
            )
        wait_until_healthy(self.url, self._process, self.log, within=120)

    def stop(self) -> None:
        """Ends it as an admin does."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            self._process.wait(60)

    def kill(self) -> None:
        """kill -9."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(10)

    def get(self, path: str) -> requests.Response:
        """GET, with its credentials."""
        return requests.get(self.url + path, auth=self.auth, timeout=60)

    def post(self, path: str, body: object, **headers: str) -> requests.Response:
        """POST of JSON, with its credentials."""
        return requests.post(
            self.url + path, json=body, auth=self.auth, headers=headers, timeout=200
        )

    def command(self, *arguments: str, status: int = 0) -> str:
        """Runs `ml-backend …`; answers what it printed, fails where its exit status is another."""
        return self._command(arguments, status).stdout

    def failing(self, *arguments: str) -> str:
        """Runs a command that must fail; answers what it says of it."""
        said = self._command(arguments, 1).stderr
        assert "Traceback" not in said, said
        return said

    def _command(self, arguments: tuple[str, ...], status: int) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "ml_backend.cli", *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            cwd=self.log.parent,
            timeout=300,
        )
        assert done.returncode == status, f"{done.stdout}\n{done.stderr}\n{self.tail()}"
        return done

    def json(self, *arguments: str, status: int = 0) -> Any:
        """Runs `ml-backend … --json`; answers what it says."""
        return json.loads(self.command(*arguments, "--json", status=status))

    def tail(self) -> str:
        """The end of its log."""
        return self.log.read_text(errors="replace")[-4000:] if self.log.exists() else ""


MakeBackend = Callable[..., RunningBackend]


@pytest.fixture
def make_backend(tmp_path: Path) -> Iterator[MakeBackend]:
    """Starts backends; all are ended with the test."""
    started: list[RunningBackend] = []

    def make(**settings: str) -> RunningBackend:
        folder = tmp_path / f"backend-{len(started)}"
        folder.mkdir()
        backend = RunningBackend(folder, **settings)
        started.append(backend)
        backend.start()
        return backend

    yield make
    for backend in started:
        backend.stop()


def wait_for(condition: Callable[[], Any], *, within: float, what: str, every: float = 0.25) -> Any:
    """Waits until a condition answers something true; answers that."""
    until = time.monotonic() + within
    while time.monotonic() < until:
        if found := condition():
            return found
        time.sleep(every)
    raise AssertionError(f"not within {within:g} s: {what}")


def make_live(
    backend: Backend,
    detector: Detector,
    name: str,
    *,
    key: str,
    label_config: str,
    boxes: Mapping[str, int] | None = None,
) -> Path:
    """Makes a detector a project's live version, as a training does; answers its folder."""
    project = backend.ingest.introduce(key, int(key.partition(".")[0]), label_config=label_config)
    counts = dict.fromkeys(detector.labels, 5) if boxes is None else dict(boxes)
    card = {
        "data": {"tasks": 5, "boxes": counts},
        "metrics": {"map50": 0.5, "map50_interval": {"low": 0.4, "high": 0.6}},
    }
    folder = backend.artefacts.publish(key, name, detector.save, card)
    verdict = Verdict(promote=True, reason=reason(Code.FIRST_VERSION, ap50=0.5))
    parent = project.live_version
    with backend.database.session() as session:
        backend.versions.record(session, project.id, name, card, verdict, parent=parent, revision=1)
    return folder
