"""Test where the doctor looks for the server, and whether versions can be stored."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ml_backend.backend import Backend
from ml_backend.demo.label_studio_server import free_port
from ml_backend.doctor.finding import Examined, Finding
from ml_backend.doctor.machine import artefacts
from ml_backend.doctor.server import server
from ml_backend.reasons import Reason
from ml_backend.settings import load_settings
from ml_backend.store.tables import Project
from ml_backend.wording import words
from ml_backend.wording.doctor import REMEDIES, WORDS, remedy

KEY = "1.1795463889"


@pytest.fixture
def address() -> Iterator[str]:
    """Runs a server that answers `GET /health`; gives its address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Says nothing."""

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}"
        listening.shutdown()


def _look(
    folder: Path, *, port: int, connected: str | None = None, number: int | None = None
) -> list[Finding]:
    backend = Backend(load_settings({"MODEL_DIR": str(folder), "PORT": str(port)}))
    backend.ingest.introduce(KEY, 1, label_config="<View/>")
    if connected is not None:
        with backend.database.session() as session:
            session.query(Project).filter_by(key=KEY).one().connection_url = connected
    return list(
        server(
            Examined(
                backend.settings,
                backend.database,
                backend.artefacts,
                backend.label_studios,
                number,
            )
        )
    )


@pytest.mark.parametrize("number", [None, 1])
def test_doctor_server_answers_at_the_connections_address_is_ok(
    tmp_path: Path, address: str, number: int | None
) -> None:
    (found,) = _look(tmp_path, port=free_port(), connected=address, number=number)
    assert (found.status, remedy(found.reason)) == ("ok", "")
    assert words(found.reason) == f"{address}, the address of the connection, is up"


def test_doctor_server_connections_address_is_good_for_label_studio_alone_is_ok(
    tmp_path: Path, address: str
) -> None:
    nowhere = f"http://127.0.0.1:{free_port()}"
    port = int(address.rpartition(":")[2])
    (found,) = _look(tmp_path, port=port, connected=nowhere)
    assert found.status == "ok"
    assert f"{nowhere}, the address of the connection, does not answer from here" in words(
        found.reason
    )


def test_doctor_server_answers_nowhere_names_every_address_tried(tmp_path: Path) -> None:
    nowhere, port = f"http://127.0.0.1:{free_port()}", free_port()
    (found,) = _look(tmp_path, port=port, connected=nowhere)
    assert (found.status, remedy(found.reason)) == ("error", "start it: `ml-backend serve`")
    assert nowhere in words(found.reason)
    assert f":{port}" in words(found.reason)


def test_doctor_server_without_a_connection_is_looked_for_at_host_and_port(
    tmp_path: Path, address: str
) -> None:
    (found,) = _look(tmp_path, port=int(address.rpartition(":")[2]))
    assert found == Finding("server", "ok", Reason("doctor.server_up", {"url": address}))
    assert (words(found.reason), remedy(found.reason)) == (f"{address} is up", "")


def test_remedies_belong_to_codes_that_have_words() -> None:
    assert set(REMEDIES) <= set(WORDS)


def test_doctor_artefacts_in_a_folder_that_cannot_be_written_names_the_setting(
    tmp_path: Path,
) -> None:
    taken = tmp_path / "taken"
    taken.touch()
    found = {}
    for name, url in (("usable", tmp_path / "versions"), ("taken", taken / "versions")):
        settings = {"MODEL_DIR": str(tmp_path / "state"), "ML_BACKEND_ARTEFACTS_URL": str(url)}
        backend = Backend(load_settings(settings))
        examined = Examined(
            backend.settings, backend.database, backend.artefacts, backend.label_studios, None
        )
        (found[name],) = artefacts(examined)
    assert found["usable"].status == "ok"
    assert found["taken"].status == "error"
    assert words(found["taken"].reason).startswith("ML_BACKEND_ARTEFACTS_URL: ")
