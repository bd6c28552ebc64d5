"""Test settings: names, precedence, and the one line that an admin reads when one is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ml_backend.settings import SettingsError, load_settings, setting_names

ROOT = Path(__file__).parents[1]


def test_load_settings_environment_wins_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "settings.env"
    file.write_text("PORT=9191\nML_BACKEND_TRAIN_EVERY=7\n")
    settings = load_settings({"ML_BACKEND_CONFIG": str(file), "PORT": "9292"})
    assert settings.port == 9292
    assert settings.train_every == 7


@pytest.mark.parametrize(
    ("environ", "names"),
    [
        ({"ML_BACKEND_TRIAN_EVERY": "3"}, ["ML_BACKEND_TRIAN_EVERY", "ML_BACKEND_TRAIN_EVERY"]),
        ({"ML_BACKEND_PRESET": "huge"}, ["ML_BACKEND_PRESET", "huge", "tiny"]),
        ({"ML_BACKEND_WEIGHTS": "/no/such/file"}, ["ML_BACKEND_WEIGHTS", "/no/such/file"]),
        ({"ML_BACKEND_DEVICE": "tpu"}, ["ML_BACKEND_DEVICE"]),
        ({"PORT": "99999"}, ["PORT"]),
        ({"LABEL_STUDIO_URL": "label-studio:8080"}, ["LABEL_STUDIO_URL", "http://"]),
        ({"DATABASE_URL": "mysql://x"}, ["DATABASE_URL", "postgresql://"]),
        (
            {"QUEUE_URL": "redis://127.0.0.1:6379/0"},
            ["QUEUE_URL: the queue lies in the database now (DATABASE_URL): remove the"],
        ),
        ({"BASIC_AUTH_USER": "me"}, ["BASIC_AUTH_PASS"]),
        ({"BASIC_AUTH_USER": "me", "BASIC_AUTH_PASS": "пароль"}, ["BASIC_AUTH_PASS", "Latin-1"]),
        ({"ML_BACKEND_WEBHOOK_SECRET": "сезам"}, ["ML_BACKEND_WEBHOOK_SECRET", "Latin-1"]),
        ({"ML_BACKEND_WEBHOOK_SECRET": "open\nsesame"}, ["ML_BACKEND_WEBHOOK_SECRET", "header"]),
        ({"ML_BACKEND_WEBHOOK_SECRET": " sesame"}, ["ML_BACKEND_WEBHOOK_SECRET", "header"]),
        ({"DATABASE_URL": "postgresql://me@host:port/x"}, ["DATABASE_URL", "host:5432"]),
        ({"ML_BACKEND_CONFIG": "/no/such/file"}, ["ML_BACKEND_CONFIG"]),
        *(
            ({"ML_BACKEND_ALLOWED_IMAGE_HOSTS": f"minio, {wrong}"}, ["_IMAGE_HOSTS", wrong])
            for wrong in ("http://minio", "minio:9000", "10.0.0", "10.0.0.0/33", "*", "a..b")
        ),
    ],
)
def test_load_settings_wrong_value_is_named_in_one_line(
    environ: dict[str, str], names: list[str]
) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(environ)
    text = str(caught.value)
    assert "\n" not in text
    for name in names:
        assert name in text


def test_load_settings_unknown_name_in_the_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "settings.env"
    file.write_text("PORTS=1\n")
    with pytest.raises(SettingsError, match="PORTS"):
        load_settings({"ML_BACKEND_CONFIG": str(file)})


def test_load_settings_removed_setting_in_the_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "settings.env"
    file.write_text("QUEUE_URL=redis://127.0.0.1:6379/0\n")
    with pytest.raises(SettingsError, match=r"QUEUE_URL: .*DATABASE_URL.*: remove the setting"):
        load_settings({"ML_BACKEND_CONFIG": str(file)})
    # As in the default file of earlier releases, where nothing was set.
    file.write_text("QUEUE_URL=\n")
    load_settings({"ML_BACKEND_CONFIG": str(file), "QUEUE_URL": ""})


def test_settings_repr_shows_no_secret() -> None:
    settings = load_settings({"LABEL_STUDIO_API_KEY": "s3cret", "ML_BACKEND_WEBHOOK_SECRET": "x9"})
    assert "s3cret" not in repr(settings)
    assert "x9" not in repr(settings)


def test_default_file_documents_every_setting() -> None:
    text = (ROOT / "config/default.env").read_text()
    for name in setting_names().values():
        assert f"# {name}=" in text, name


@pytest.mark.parametrize("command", ["status", "serve", "worker"])
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("ML_BACKEND_NO_SUCH", "ML_BACKEND_NO_SUCH is not a setting"),
        ("QUEUE_URL", "QUEUE_URL: the queue lies in the database now"),
    ],
)
def test_command_unknown_or_removed_setting_ends_the_start_with_one_line(
    command: str, name: str, said: str
) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "ml_backend.cli", command],
        env={name: "1", "PATH": "/usr/bin:/bin", "PYTHONPATH": os.environ.get("PYTHONPATH", "")},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2
    assert said in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


def test_load_settings_allowed_hosts_are_split_at_commas() -> None:
    text = " minio,img-1.example.org, 10.0.0.7,192.168.0.0/16,fd00::/8,"
    hosts = ("minio", "img-1.example.org", "10.0.0.7", "192.168.0.0/16", "fd00::/8")
    assert load_settings({"ML_BACKEND_ALLOWED_IMAGE_HOSTS": text}).allowed_image_hosts == hosts


AUTH = {"BASIC_AUTH_USER": "ann", "BASIC_AUTH_PASS": "sesame"}


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "localhost", "::1"])
def test_check_exposure_loopback_needs_no_password(host: str) -> None:
    load_settings({"HOST": host}).check_exposure()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "8.8.8.8", "my-host"])
def test_check_exposure_other_host_needs_a_password_or_allow_open(host: str) -> None:
    # The secret guards the webhook alone.
    for more in ({}, {"ML_BACKEND_WEBHOOK_SECRET": "s3cret"}, {"ML_BACKEND_ALLOW_OPEN": "false"}):
        with pytest.raises(SettingsError) as caught:
            load_settings({"HOST": host, **more}).check_exposure()
        for named in (host, "BASIC_AUTH_USER", "BASIC_AUTH_PASS", "ML_BACKEND_ALLOW_OPEN=true"):
            assert named in str(caught.value)
    load_settings({"HOST": host, **AUTH}).check_exposure()
    load_settings({"HOST": host, "ML_BACKEND_ALLOW_OPEN": "true"}).check_exposure()


@pytest.mark.parametrize(
    "program",
    [
        ["ml_backend.cli", "serve"],
        ["gunicorn", "--config", str(ROOT / "config/gunicorn.conf.py"), "no:app"],
    ],
    ids=["serve", "gunicorn alone"],
)
def test_serve_open_host_is_not_started(program: list[str], tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", *program],
        env={**os.environ, "HOST": "0.0.0.0", "MODEL_DIR": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 2
    assert "BASIC_AUTH_PASS" in ended.stderr
    assert "ML_BACKEND_ALLOW_OPEN" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert list(tmp_path.iterdir()) == []


def test_predicts_at_a_time_leaves_threads_for_other_requests() -> None:
    at_a_time = {n: load_settings({"THREADS": str(n)}).predicts_at_a_time for n in (2, 9, 16, 64)}
    assert at_a_time == {2: 1, 9: 4, 16: 8, 64: 56}
    assert load_settings({}).predicts_at_a_time >= 32
