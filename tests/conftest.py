"""Provide the fixtures of the tests: a real Label Studio, databases, and running backends.

`pytest_collection_modifyitems` marks each test by the fixtures that it uses, so that `make check`
can leave out the tests that need a Label Studio or a running server.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
from filelock import FileLock
from hypothesis import settings

from ml_backend.backend import Backend
from ml_backend.demo.label_studio_server import (
    LabelStudioServer,
    Login,
    free_port,
    wait_until_healthy,
)
from ml_backend.detection.detector import Detector
from ml_backend.reasons import Code, reason
from ml_backend.settings import load_settings
from ml_backend.store.database import Database
from ml_backend.training.promotion import Verdict, Versions
from tests.job_loop import Loop, MakeLoop
from tests.postgresql import PostgreSQL, running_postgresql

ROOT = Path(__file__).parents[1]
CAPTURES = Path(__file__).parent / "captures"

GROUPS = {
    "label_studio": "label_studio",
    "label_studio_cache": "label_studio",
    "make_backend": "server",
    "run_backend": "server",
}
"""The marker that a test gets for asking, itself or through another fixture, for a fixture."""

LOGIN = Login("admin@example.com", "not-a-secret-of-anyone", "0123456789abcdef" * 2 + "01234567")
"""First user of the tests' Label Studio, who is stored in the prepared folder."""

# Consoles read their size from these when they are made; tests set them for a command.
for _name in ("COLUMNS", "LINES"):
    os.environ.pop(_name, None)

# The same examples in every run, so that a failure comes from the change under test;
# `--hypothesis-profile default` draws new ones.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test with the groups of the fixtures that it uses."""
    for item in items:
        used = getattr(item, "fixturenames", ())
        for group in {GROUPS[name] for name in used if name in GROUPS}:
            item.add_marker(group)


def capture(name: str) -> dict[str, Any]:
    """Return the body of a request that Label Studio 1.23.2 sent: `POST_setup`, for example."""
    content = json.loads((CAPTURES / f"{name}.json").read_text())
    body: dict[str, Any] = content["body"]
    return body


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove a developer's own settings from the environment."""
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
def label_studio_cache(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Return the folder for `prepared_label_studio`, which other processes and runs share."""
    cache = request.config.cache
    return cache.mkdir("label-studio") if cache else tmp_path_factory.mktemp("prepared")


@pytest.fixture(scope="session")
def label_studio(
    label_studio_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LabelStudioServer]:
    """Run a real Label Studio for all tests of this process; each test makes its own projects."""
    folder = tmp_path_factory.mktemp("label-studio") / "data"
    shutil.copytree(prepared_label_studio(label_studio_cache), folder)
    with LabelStudioServer(label_studio_program(), folder, login=LOGIN) as server:
        yield server


def label_studio_program() -> Path:
    """Return the path of Label Studio's program, which has an environment of its own."""
    program = Path(
        os.environ.get("TEST_LABEL_STUDIO", ROOT / ".venv-label-studio/bin/label-studio")
    )
    if not program.is_file():
        pytest.fail(f"there is no {program}: `make test` installs Label Studio")
    return program


def prepared_label_studio(cache: Path) -> Path:
    """Return a data folder in which Label Studio has migrated its database and made its user.

    A first start takes 30 s of CPU time, nearly all for migrations; a start in a copy of this
    folder takes 3 s. The folder is made once for each version of Label Studio.
    """
    program = label_studio_program()
    environment = program.resolve().parents[1]
    (version,) = environment.glob("lib/python*/site-packages/label_studio-*.dist-info")
    prepared = cache / version.stem
    with FileLock(cache / f"{version.stem}.lock"):
        if not prepared.is_dir():
            unfinished = cache / f"{version.stem}.unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)
            with LabelStudioServer(program, unfinished, login=LOGIN):
                pass
            unfinished.rename(prepared)
    return prepared


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgreSQL]:
    """Run a PostgreSQL server for all tests of this process; each empties its database first."""
    with running_postgresql() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the address of an empty database of each kind, as `Settings.database` gives it."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'test.db'}"
    server: PostgreSQL = request.getfixturevalue("postgresql")
    server.empty()
    return load_settings({"DATABASE_URL": server.url}).database


@pytest.fixture
def make_loop(database_url: str, tmp_path: Path) -> Iterator[MakeLoop]:
    """Return a function that makes the loop of a test, with more settings."""
    made: list[Loop] = []

    def make(**settings: str) -> Loop:
        made.append(Loop(database_url, tmp_path, **settings))
        return made[-1]

    yield make
    for loop in made:
        loop.close()


@pytest.fixture
def loop(make_loop: MakeLoop) -> Loop:
    """Make a project and its jobs, without a quiet time, on each kind of database."""
    return make_loop()


def ask(
    server: LabelStudioServer, method: str, path: str, body: object = None, **params: str
) -> Any:
    """Send a request to Label Studio's API as the user who owns its projects; return its answer."""
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
    """Count the predictions that Label Studio holds, by task and model version."""
    found = ask(server, "GET", f"/api/predictions/?project={project}")
    return Counter((p["task"], p["model_version"]) for p in found)


def predictions_by_task(server: LabelStudioServer, project: int) -> dict[int, Counter[str]]:
    """Count the predictions of each model version that Label Studio holds, task by task."""
    found: dict[int, Counter[str]] = {}
    for (task, version), count in predictions_held(server, project).items():
        found.setdefault(task, Counter())[version] = count
    return found


class RunningBackend:
    """Run `ml-backend serve` as a user does.

    Args:
        folder: holds the log, and `MODEL_DIR` below it.
        settings: environment variables beside or instead of the usual ones.
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
        """The user and password of its basic authentication, if it has one."""
        if "BASIC_AUTH_USER" not in self.settings:
            return None
        return self.settings["BASIC_AUTH_USER"], self.settings["BASIC_AUTH_PASS"]

    @property
    def pid(self) -> int:
        """The process id of `ml-backend serve`."""
        assert self._process is not None
        return self._process.pid

    def job_processes(self, kind: str) -> list[psutil.Process]:
        """Find the processes of a kind of job, without the readers that a training forks."""
        found = {
            child.pid: child
            for child in psutil.Process(self.pid).children(recursive=True)
            if {"ml_backend.programs.job", kind} <= set(child.cmdline())
        }
        return [child for child in found.values() if child.ppid() not in found]

    def start(self) -> None:
        """Start the backend and wait until it answers."""
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
        """Send SIGTERM, as a service manager does, and wait for the end."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            self._process.wait(60)

    def kill(self) -> None:
        """Send SIGKILL and wait for the end."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(10)

    def get(self, path: str) -> requests.Response:
        """Send GET with its credentials."""
        return requests.get(self.url + path, auth=self.auth, timeout=60)

    def post(self, path: str, body: object, **headers: str) -> requests.Response:
        """Send POST of JSON with its credentials."""
        return requests.post(
            self.url + path, json=body, auth=self.auth, headers=headers, timeout=200
        )

    def command(self, *arguments: str, status: int = 0) -> str:
        """Run `ml-backend …`, check its exit status, and return its standard output."""
        return self._command(arguments, status).stdout

    def failing(self, *arguments: str) -> str:
        """Run `ml-backend …`, which must end with status 1; return its standard error."""
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
        """Run `ml-backend … --json`, check its exit status, and return the decoded output."""
        return json.loads(self.command(*arguments, "--json", status=status))

    def tail(self) -> str:
        """Return the last 4,000 characters of its log."""
        return self.log.read_text(errors="replace")[-4000:] if self.log.exists() else ""


MakeBackend = Callable[..., RunningBackend]
RunBackend = Callable[[RunningBackend], RunningBackend]


@pytest.fixture
def make_backend(tmp_path: Path) -> Iterator[MakeBackend]:
    """Return a function that starts a backend with given settings; all end with the test."""
    with ExitStack() as running:
        folders = (tmp_path / f"backend-{number}" for number in range(1000))

        def make(**settings: str) -> RunningBackend:
            folder = next(folders)
            folder.mkdir()
            backend = RunningBackend(folder, **settings)
            running.callback(backend.stop)
            backend.start()
            return backend

        yield make


@pytest.fixture(scope="module")
def run_backend() -> Iterator[RunBackend]:
    """Return a function that starts a backend for all tests of a file, and ends it after them."""
    with ExitStack() as running:

        def run(backend: RunningBackend) -> RunningBackend:
            running.callback(backend.stop)
            backend.start()
            return backend

        yield run


def wait_for(condition: Callable[[], Any], *, within: float, what: str, every: float = 0.25) -> Any:
    """Wait until a condition is true; return its value.

    Args:
        condition: asked again and again.
        within: seconds after which the test fails.
        what: what is waited for, for the failure's text.
        every: seconds between two questions.
    """
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
    """Make a detector the live version of a project, as a training does.

    Args:
        backend: where the project is stored; the project is added where it is missing.
        detector: saved as the version.
        name: of the version.
        key: of the project.
        label_config: of the project.
        boxes: training boxes of each label that the version's card names; 5 each by default.

    Returns:
        The version's folder.
    """
    project = backend.ingest.introduce(key, int(key.partition(".")[0]), label_config=label_config)
    counts = dict.fromkeys(detector.labels, 5) if boxes is None else dict(boxes)
    card = {
        "data": {"tasks": 5, "boxes": counts},
        "metrics": {"map50": 0.5, "map50_interval": {"low": 0.4, "high": 0.6}},
    }
    folder = backend.artefacts.publish(key, name, detector.save, card)
    record_version(
        backend.versions,
        backend.database,
        project.id,
        name,
        card,
        Verdict(promote=True, reason=reason(Code.FIRST_VERSION, ap50=0.5)),
        parent=project.live_version,
    )
    return folder


def record_version(
    versions: Versions,
    database: Database,
    project_id: int,
    name: str,
    card: dict[str, Any],
    verdict: Verdict,
    *,
    parent: str | None,
    revision: int = 1,
) -> Verdict:
    """Record a version in a transaction of its own; return the verdict that holds."""
    with database.session() as session:
        return versions.record(
            session, project_id, name, card, verdict, parent=parent, revision=revision
        )
