"""Take a database away, lock or damage it under a running server, which must answer with the reason
and acknowledge nothing that it does not store."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient

from ml_backend.backend import Backend
from ml_backend.http.app import create_app
from ml_backend.settings import load_settings
from ml_backend.store import database as module
from tests.conftest import capture

SETUP: dict[str, Any] = capture("POST_setup")
HOOK: dict[str, Any] = capture("POST_webhook_ANNOTATION_CREATED")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "ml-backend.db"


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FlaskClient]:
    monkeypatch.setattr(module, "_WAIT", 0.3)
    settings = {
        "MODEL_DIR": str(tmp_path),
        "ML_BACKEND_DEVICE": "cpu",
        "ML_BACKEND_WEIGHTS": "none",
    }
    backend = Backend(load_settings(settings))
    yield create_app(backend).test_client()
    backend.database.close()


def _hear(client: FlaskClient, status: int, *words: str) -> None:
    answer = client.post("/webhook", json=HOOK)
    assert answer.status_code == status, answer.text
    assert all(word in answer.text for word in words), answer.text


def _annotations(file: Path) -> int:
    with closing(sqlite3.connect(file)) as database:
        (count,) = database.execute("SELECT count(*) FROM annotations").fetchone()
        return int(count)


def _move(file: Path, to: str) -> None:
    for part in ("", "-wal", "-shm"):
        path = Path(f"{file}{part}")
        if path.exists():
            path.rename(f"{file.with_name(to)}{part}")


def test_webhook_database_file_removed_answers_503_until_it_is_back(
    client: FlaskClient, file: Path
) -> None:
    _hear(client, 200)
    _move(file, "elsewhere.db")
    for _ in range(3):
        _hear(client, 503, "cannot be used")
    # The file that the server made instead is empty; with the old one back, it serves again.
    _move(file, "empty.db")
    _move(file.with_name("elsewhere.db"), file.name)
    assert client.post("/webhook", json=HOOK).status_code in (200, 503)
    _hear(client, 200)
    assert _annotations(file) == 1


def test_webhook_database_file_replaced_answers_503_once_and_writes_into_the_new_file(
    client: FlaskClient, file: Path, tmp_path: Path
) -> None:
    with closing(sqlite3.connect(file)) as old, closing(sqlite3.connect(tmp_path / "copy")) as copy:
        old.backup(copy)
    _hear(client, 200)
    _move(file, "old.db")
    (tmp_path / "copy").rename(file)
    _hear(client, 503, "removed or replaced")
    _hear(client, 200)
    assert _annotations(file) == 1


def test_webhook_database_locked_by_another_answers_503_after_a_wait(
    client: FlaskClient, file: Path
) -> None:
    with closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        _hear(client, 503, "locked")
        # A thread does not wait for ever for another thread of this server, either.
        lock = client.application.extensions["ml_backend"].database._lock
        with lock:
            _hear(client, 503, "locked")
        other.execute("ROLLBACK")
    _hear(client, 200)


def test_requests_database_file_damaged_answer_503_without_a_traceback(
    client: FlaskClient, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _hear(client, 200)
    client.application.extensions["ml_backend"].database.close()
    content = bytearray(file.read_bytes())
    content[4096:] = b"\x5a" * (len(content) - 4096)
    file.write_bytes(content)
    token = "a-token-that-nobody-may-see"
    setup = client.post("/setup", json={**SETUP, "hostname": "http://x", "access_token": token})
    for answer in (setup, client.post("/webhook", json=HOOK), client.get("/versions")):
        assert answer.status_code == 503, answer.text
        assert "damaged" in answer.text or "malformed" in answer.text
    assert "Traceback" not in caplog.text
    assert token not in caplog.text
