"""Test `ml-backend`: texts of users are shown unchanged, and failures are said in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from ml_backend import cli
from ml_backend.backend import Backend
from ml_backend.demo.label_studio_server import free_port
from ml_backend.demo.project import LABEL_CONFIG
from ml_backend.detection.detector import Detector
from ml_backend.detection.presets import preset_named
from ml_backend.machine import die_with_parent
from ml_backend.reasons import Code, reason
from ml_backend.settings import load_settings
from ml_backend.store.tables import Job, Project
from ml_backend.training.promotion import Verdict
from ml_backend.wording import words
from tests.conftest import capture, make_live, record_version

KEY, OTHER = "1.1795463889", "1.1577836800"
LABELS = ("Circle", "Square", "Triangle")
HOSTILE = "Cats [/done] [bold]all[/] [red :cat: \\"


@dataclass(frozen=True, slots=True)
class Ended:
    """Holds status and output of a command that has ended."""

    status: int
    out: str
    err: str


Run = Callable[..., Ended]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Makes a function that runs the console script on a `MODEL_DIR` of its own."""

    def command(*arguments: str, **settings: str) -> Ended:
        values = {
            "MODEL_DIR": str(tmp_path / "state"),
            "ML_BACKEND_DEVICE": "cpu",
            "ML_BACKEND_WEIGHTS": "none",
            "COLUMNS": "400",
            **settings,
        }
        for name, value in values.items():
            monkeypatch.setenv(name, value)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["ml-backend", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        return Ended(int(ended.value.code or 0), said.out, said.err)

    return command


@pytest.fixture
def backend(tmp_path: Path) -> Backend:
    """Makes the backend that the commands find."""
    return Backend(load_settings({"MODEL_DIR": str(tmp_path / "state")}))


def _learn(backend: Backend, name: str, key: str = KEY) -> None:
    cpu = torch.device("cpu")
    detector = Detector.pretrained(preset_named("tiny", cpu), LABELS, "none", cpu)
    make_live(backend, detector, name, key=key, label_config=LABEL_CONFIG)


def _live(backend: Backend) -> dict[str, str | None]:
    with backend.database.reading() as session:
        return {p.key: p.live_version for p in session.query(Project)}


# Texts of users


def test_status_and_versions_texts_of_users_are_shown_unchanged(run: Run, backend: Backend) -> None:
    _learn(backend, "v1")
    project = backend.ingest.introduce(KEY, 1, label_config=LABEL_CONFIG)
    card: dict[str, Any] = {
        "data": {"tasks": 5, "boxes": {}},
        "metrics": {"map50": 0.5, "map50_interval": {"low": 0.4, "high": 0.6}},
    }
    change = {"live": "v1", "delta": 0.1, "low": 0.0, "high": 0.2}
    falls = reason(Code.LABEL_FALLS, label=HOSTILE, fall=0.2, **change)
    record_version(
        backend.versions,
        backend.database,
        project.id,
        "v2",
        card,
        Verdict(promote=False, reason=falls),
        parent="v1",
    )
    with backend.database.session() as session:
        session.get_one(Project, project.id).title = HOSTILE
        session.add(
            Job(
                project_id=project.id,
                kind="train",
                state="failed",
                trigger="button",
                reason=reason(Code.UNEXPECTED_ERROR, detail=HOSTILE),
            )
        )
    status = run("status")
    assert status.status == 0
    assert f"{HOSTILE} ({KEY})" in status.out
    assert f"train 1: failed: {HOSTILE}" in status.out
    versions = run("versions", "-p", "1")
    assert versions.status == 0
    assert f"not promoted: {HOSTILE} falls by 0.20" in versions.out
    (second, _) = json.loads(run("versions", "-p", "1", "--json").out)
    assert second["reason"] == words(falls)
    assert second["reason_code"] == Code.LABEL_FALLS
    assert second["reason_values"] == falls.values
    ((job, *_),) = (p["jobs"] for p in json.loads(run("status", "--json").out))
    assert job["reason"] == HOSTILE
    assert job["reason_code"] == Code.UNEXPECTED_ERROR
    assert job["reason_values"] == {"detail": HOSTILE}


@pytest.mark.parametrize(
    ("arguments", "settings", "status", "said"),
    [
        (["status"], {"ML_BACKEND_PRESET": "[/foo]"}, 2, "(it is '[/foo]')"),
        (["status"], {"ML_BACKEND_WEIGHTS": "[/foo]"}, 2, "there is no file [/foo]"),
        (["status"], {"ML_BACKEND_CONFIG": "[bold]"}, 2, "there is no file [bold]"),
        (
            ["doctor"],
            {"LABEL_STUDIO_URL": "http://127.0.0.1:1/[/foo]"},
            1,
            "127.0.0.1:1/[/foo] does",
        ),
        (["promote", "-p", "1", "[/v9]"], {}, 1, "has no version [/v9]"),
        (["rollback", "-p", "1", "--to", "[red]v9"], {}, 1, "has no version [red]v9"),
        (["versions", "-p", "[/foo]"], {}, 2, "project: '[/foo]'"),
        (["simulate", "[/foo]"], {}, 1, "[/foo]"),
        (["simulate", ".", "--strategies", "[/foo]"], {}, 2, "there is no strategy '[/foo]'"),
    ],
)
def test_command_wrong_value_is_named_as_it_was_written(
    run: Run,
    backend: Backend,
    arguments: list[str],
    settings: dict[str, str],
    status: int,
    said: str,
) -> None:
    _learn(backend, "v1")
    ended = run(*arguments, **{"LABEL_STUDIO_API_KEY": "0" * 40, **settings})
    assert ended.status == status, ended
    assert said in ended.out + ended.err


# Faults outside the program


@pytest.mark.parametrize(
    ("settings", "status", "said"),
    [
        ({"MODEL_DIR": "/proc/x"}, 2, "MODEL_DIR: /proc/x"),
        ({"MODEL_DIR": "a-file"}, 2, "MODEL_DIR: a-file"),
        ({"MODEL_DIR": "a-file/below"}, 2, "MODEL_DIR: a-file/below"),
        ({"MODEL_DIR": "/proc"}, 2, "MODEL_DIR: /proc"),
        ({"DATABASE_URL": "sqlite:///a-file/db"}, 2, "DATABASE_URL: "),
        (
            {"DATABASE_URL": "postgresql://me:s3cret@127.0.0.1:1/db"},
            1,
            "DATABASE_URL: the database",
        ),
        ({"DATABASE_URL": "postgresql://me:s3cret@127.0.0.1:port/db"}, 2, "DATABASE_URL: "),
    ],
)
@pytest.mark.parametrize("command", ["status", "worker", "serve"])
def test_command_unusable_folder_or_database_is_named_in_one_line(
    run: Run, tmp_path: Path, command: str, settings: dict[str, str], status: int, said: str
) -> None:
    (tmp_path / "a-file").write_text("")
    ended = run(command, **settings)
    assert ended.status == status, ended
    line = ended.err.splitlines()[-1]
    assert said in line
    assert "s3cret" not in ended.out + ended.err


def test_status_forbidden_folder_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    folder.mkdir()
    folder.chmod(0o500)
    # Nothing is forbidden to root, so somebody else looks.
    program = (
        "import os, sys\n"
        "from ml_backend import backend, cli\n"
        "if os.geteuid() == 0: os.seteuid(65534)\n"
        "sys.argv = ['ml-backend', 'status']\n"
        "cli.main()\n"
    )
    tmp_path.chmod(0o755)
    ended = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "MODEL_DIR": str(folder)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 2, ended.stderr
    assert "MODEL_DIR" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_train_without_a_worker_is_kept_in_the_queue(run: Run, backend: Backend) -> None:
    _learn(backend, "v1")
    for number in (1, 2):
        _annotate(backend, number)
    ended = run("train", "-p", KEY, "--json")
    assert ended.status == 0, ended
    asked = json.loads(ended.out)
    assert (asked["state"], asked["reason"]) == ("queued", "asked for, with 2 annotated tasks")
    assert asked["reason_code"] == Code.ASKED_FOR
    assert asked["reason_values"] == {"annotated": 2}
    job = backend.jobs.get(asked["job"])
    assert job is not None
    assert (job.kind, job.state) == ("train", "queued")
    assert backend.jobs.claim(job.id, job.run, "here") is not None


def _annotate(backend: Backend, number: int) -> None:
    from ml_backend.label_studio.events import Ignored, parse_event

    body = capture("POST_webhook_ANNOTATION_CREATED")
    body["annotation"] |= {"id": number, "task": number}
    body["task"]["id"] = number
    event = parse_event(body)
    assert not isinstance(event, Ignored)
    backend.ingest.apply(event, event.project)


def test_command_database_of_a_newer_release_is_left_alone(run: Run, backend: Backend) -> None:
    with backend.database.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    for command in ("status", "serve"):
        ended = run(command)
        assert ended.status == 2, ended
        line = ended.err.splitlines()[-1]
        assert "MODEL_DIR: the database cannot be used: its schema is 9999" in line
        assert "install the release that wrote it" in line


def test_doctor_damaged_live_version_is_found(run: Run, backend: Backend) -> None:
    _learn(backend, "v1")
    _learn(backend, "v2")
    assert f"project {KEY}: v2 loads" in run("doctor").out
    file = backend.artefacts.existing(KEY, "v2") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    said = run("doctor")
    assert said.status == 1
    assert f"project {KEY}: v2 cannot serve; an earlier one does" in said.out
    assert f"`ml-backend rollback -p {KEY}`" in said.out


def test_command_fault_of_the_program_is_raised(
    run: Run, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise TypeError("a fault")

    _learn(backend, "v1")
    monkeypatch.setattr("ml_backend.training.promotion.Versions.all", broken)
    with pytest.raises(TypeError, match="a fault"):
        run("versions", "-p", "1")


@pytest.mark.parametrize("command", ["serve", "worker"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ML_BACKEND_PRESET", "no_such_module:preset"),
        ("ML_BACKEND_PRESET", "json:loads"),
        ("ML_BACKEND_WEIGHTS", "a-file"),
    ],
)
def test_serve_and_worker_unusable_detector_stops_the_start(
    tmp_path: Path, command: str, name: str, value: str
) -> None:
    (tmp_path / "a-file").write_text("no weights")
    # A process of its own: if the setting were accepted, it would go on for ever.
    ended = subprocess.run(
        [sys.executable, "-m", "ml_backend.cli", command],
        env={
            **os.environ,
            "MODEL_DIR": str(tmp_path / "state"),
            "PORT": str(free_port()),
            "ML_BACKEND_DEVICE": "cpu",
            name: value,
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=die_with_parent,
    )
    assert ended.returncode == 2, ended.stderr
    assert len(ended.stderr.splitlines()) == 1
    assert f"wrong setting: {name}: " in ended.stderr


@pytest.mark.parametrize(
    ("command", "name", "why"),
    [
        (
            "serve",
            "circle",
            "cannot be imported from their_controls:Circle (no licence): repair the package, or "
            "uninstall it",
        ),
        (
            "worker",
            "rectanglelabels",
            "has the name of a built-in one: rename it there, or uninstall the package",
        ),
    ],
)
def test_serve_and_worker_unusable_extension_of_another_package_stops_the_start(
    tmp_path: Path, command: str, name: str, why: str
) -> None:
    metadata = tmp_path / "site" / "their_controls-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: their-controls\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text(
        f"[ml_backend.controls]\n{name} = their_controls:Circle\n"
    )
    (tmp_path / "site" / "their_controls.py").write_text("raise RuntimeError('no licence')\n")
    path = [str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")]
    # A process of its own: if the fault were not noticed, it would go on for ever.
    ended = subprocess.run(
        [sys.executable, "-m", "ml_backend.cli", command],
        env={
            **os.environ,
            "MODEL_DIR": str(tmp_path / "state"),
            "PORT": str(free_port()),
            "ML_BACKEND_DEVICE": "cpu",
            "PYTHONPATH": os.pathsep.join(filter(None, path)),
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=die_with_parent,
    )
    assert ended.returncode == 1, ended.stderr
    assert ended.stderr == f"error: the control {name!r} of the package their-controls {why}\n"


def test_gunicorn_alone_wrong_setting_is_named_in_one_line(tmp_path: Path) -> None:
    config = Path(__file__).parents[1] / "config/gunicorn.conf.py"
    ended = subprocess.run(
        [sys.executable, "-m", "gunicorn", "--config", str(config), "x:y"],
        env={**os.environ, "PORT": "99999"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.startswith("wrong setting: PORT: ")
    assert len(ended.stderr.splitlines()) == 1


# Which project


def test_command_project_id_of_two_label_studios_needs_the_key(run: Run, backend: Backend) -> None:
    for key in (KEY, OTHER):
        for name in ("v1", "v2"):
            _learn(backend, name, key)
    for arguments in (
        ("rollback",),
        ("versions",),
        ("train",),
        ("autolabel",),
        ("promote", "v1"),
    ):
        ended = run(*arguments, "-p", "1")
        assert ended.status == 1, ended
        assert KEY in ended.err
        assert OTHER in ended.err
    assert _live(backend) == {KEY: "v2", OTHER: "v2"}
    answer = run("rollback", "-p", OTHER, "--json")
    assert json.loads(answer.out) == {"project": OTHER, "live_version": "v1"}
    assert _live(backend) == {KEY: "v2", OTHER: "v1"}
    answer = run("promote", "-p", OTHER, "v2", "--json")
    assert json.loads(answer.out) == {"project": OTHER, "live_version": "v2"}
    assert _live(backend) == {KEY: "v2", OTHER: "v2"}
    for unknown in ("1.5", "2", "2.5"):
        ended = run("versions", "-p", unknown)
        assert ended.status == 1
        assert f"project {unknown} is not known" in ended.err
    assert run("versions", "-p", "one").status == 2
