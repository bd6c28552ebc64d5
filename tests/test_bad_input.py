"""Send a running server broken, hostile and huge input: it must refuse it and go on."""

from __future__ import annotations

import copy
import http.client
import io
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
import torch
from PIL import Image

from ml_backend.backend import Backend
from ml_backend.demo.shapes import generate
from ml_backend.detection.detector import Detector
from ml_backend.detection.presets import preset_named
from ml_backend.label_studio.label_config import parse_label_config
from ml_backend.projects.connect import SECRET_HEADER
from ml_backend.settings import load_settings
from ml_backend.store.tables import Annotation
from tests import image_host as host
from tests.conftest import RunBackend, RunningBackend, capture, make_live
from tests.image_host import ImageHost, image_host

KEY = "1.1795463889"
CONFIG: str = capture("POST_setup")["schema"]
LABELS = ("RBC", "WBC", "Platelets")
TOKEN = "fedcba9876543210fedcba9876543210fedcba98"
SECRETS = {"BASIC_AUTH_PASS": "pa55word-of-ours", "ML_BACKEND_WEBHOOK_SECRET": "5ecret-of-ours"}
LIMIT = 40_000_000


@pytest.fixture(scope="module")
def studio() -> Iterator[ImageHost]:
    """Run a host of images, which takes the place of Label Studio and of other hosts."""
    with image_host() as made:
        yield made


@pytest.fixture(scope="module")
def backend(
    tmp_path_factory: pytest.TempPathFactory, studio: ImageHost, run_backend: RunBackend
) -> RunningBackend:
    """Run one server for this file, with a version that finds something in every image."""
    running = RunningBackend(
        tmp_path_factory.mktemp("attacked"),
        LABEL_STUDIO_URL=studio.url,
        LABEL_STUDIO_API_KEY=TOKEN,
        BASIC_AUTH_USER="ann",
        **SECRETS,
        THREADS="4",
        LOG_LEVEL="DEBUG",
        ML_BACKEND_MAX_REQUEST_BYTES=str(LIMIT),
        ML_BACKEND_IMAGE_TIMEOUT="4",
        ML_BACKEND_IMAGE_MAX_BYTES="3000000",
        ML_BACKEND_TRAIN_MIN="1000",
        ML_BACKEND_AUTO_LABEL="false",
    )
    cpu = torch.device("cpu")
    parts = Backend(load_settings(running.settings))
    torch.manual_seed(0)
    detector = Detector.pretrained(preset_named("tiny", cpu), LABELS, "none", cpu)
    detector.thresholds = dict.fromkeys(LABELS, 0.0)
    make_live(parts, detector, "v1", key=KEY, label_config=CONFIG)
    parts.database.close()
    return run_backend(running)


@pytest.fixture(autouse=True)
def _server_still_answers(backend: RunningBackend) -> Iterator[None]:
    """Check after each test that the server answers and that it is the same process."""
    pid = backend.pid
    yield
    assert requests.get(f"{backend.url}/health", timeout=30).json()["status"] == "UP"
    assert "ml_backend_webhooks_total" in backend.get("/metrics").text
    assert backend.pid == pid
    assert "Worker failed" not in backend.tail()


def _post(backend: RunningBackend, path: str, body: bytes | Iterator[bytes]) -> requests.Response:
    secret = {SECRET_HEADER: SECRETS["ML_BACKEND_WEBHOOK_SECRET"]}
    return requests.post(
        backend.url + path, data=body, auth=backend.auth, headers=secret, timeout=200
    )


def _refused(answer: requests.Response, status: int, *words: str) -> None:
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error"}
    for word in words:
        assert word in answer.text


def _hook(number: int, result: list[Any]) -> dict[str, Any]:
    body = copy.deepcopy(capture("POST_webhook_ANNOTATION_CREATED"))
    body["annotation"] |= {"id": number, "task": number, "result": result}
    body["task"]["id"] = number
    return body


def _region(number: int, **value: Any) -> dict[str, Any]:
    region: dict[str, Any] = copy.deepcopy(
        capture("POST_webhook_ANNOTATION_CREATED")["annotation"]["result"][0]
    )
    region["id"] = f"r{number}"
    region["value"] |= value
    return region


def _stored(backend: RunningBackend, number: int) -> list[Any]:
    parts = Backend(load_settings(backend.settings))
    with parts.database.reading() as session:
        found = session.query(Annotation).filter_by(label_studio_id=number).one()
    parts.database.close()
    return found.result


# Images


def _png(image: Image.Image) -> bytes:
    target = io.BytesIO()
    image.save(target, "PNG")
    return target.getvalue()


def test_predict_bad_images_leaves_only_their_own_tasks_empty(
    backend: RunningBackend, studio: ImageHost
) -> None:
    good = generate(1, seed=1)[0].encoded()
    frames = [Image.new("RGB", (64, 48), colour) for colour in ("red", "blue", "green")]
    animated = io.BytesIO()
    frames[0].save(animated, "GIF", save_all=True, append_images=frames[1:])
    # For each file: the answer, and whether it is an image.
    corpus: dict[str, tuple[host.Answer, bool]] = {
        "good.jpg": (host.sent(good), True),
        "truncated.jpg": (host.sent(good[: len(good) // 2]), False),
        "empty.jpg": (host.sent(b""), False),
        "page.jpg": (host.sent(b"<!DOCTYPE html><title>Log in</title>"), False),
        # 12 kB each: 99 million pixels are just allowed, 400 million are not.
        "large.png": (host.sent(_png(Image.new("1", (9_900, 10_000)))), True),
        "bomb.png": (host.sent(_png(Image.new("1", (20_000, 20_000)))), False),
        "strip.png": (host.sent(_png(Image.new("RGB", (1, 50_000)))), True),
        "animated.gif": (host.sent(animated.getvalue()), True),
        # A JPEG with another extension and a wrong type is an image.
        "really-jpeg.png": (host.sent(good, Content_Type="text/html"), True),
        "endless.jpg": (host.endless, False),
        "loop.jpg": (host.redirect("/data/upload/loop.jpg"), False),
        "drip.jpg": (host.drip, False),
        "silence.jpg": (host.silence, False),
        "missing.jpg": (host.empty(404), False),
        "inside.jpg": (host.redirect(f"http://127.0.0.2:{studio.server_port}/a.jpg"), False),
        "metadata.jpg": (host.redirect("http://169.254.169.254/latest/meta-data/"), False),
        "file.jpg": (host.redirect("file:///etc/hostname"), False),
    }
    addresses = [f"/data/upload/{name}" for name in corpus]
    studio.answers |= {f"/data/upload/{name}": answer for name, (answer, _) in corpus.items()}
    elsewhere = [
        "file:///etc/hostname",
        "/etc/hostname",
        "http://localhost:1/a",
        "../a",
        "http://[",
    ]
    wanted = [usable for _, usable in corpus.values()] + [False] * len(elsewhere)
    tasks = [
        {"id": number, "data": {"image": address}}
        for number, address in enumerate([*addresses, *elsewhere], 1)
    ]
    answer = backend.post("/predict", {"tasks": tasks, "project": KEY, "label_config": CONFIG})
    assert answer.status_code == 200, answer.text
    results = answer.json()["results"]
    names = [*corpus, *elsewhere]
    assert {n: bool(r) for n, r in zip(names, results, strict=True)} == dict(
        zip(names, wanted, strict=True)
    )
    assert [r for r in results if not r] == [[]] * wanted.count(False)
    # One large image at a time: several at once took 5 GB.
    assert _peak(backend) < 3 * 2**30
    log = backend.log.read_text(errors="replace")
    assert log.count("ML_BACKEND_ALLOWED_IMAGE_HOSTS") >= 3
    told = log + backend.get("/metrics").text + answer.text
    assert all(secret not in told for secret in (TOKEN, *SECRETS.values()))
    assert f"Token {TOKEN}" in studio.tokens


def _peak(backend: RunningBackend) -> int:
    """Return the largest resident memory that a process of the server ever had, in bytes."""
    peaks = [
        int(line.split()[1]) * 1024
        for process in psutil.Process(backend.pid).children(recursive=True)
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines()
        if line.startswith("VmHWM")
    ]
    return max(peaks)


# Bodies


@pytest.mark.parametrize("path", ["/webhook", "/predict"])
def test_body_too_deep_too_large_or_not_json_is_refused(backend: RunningBackend, path: str) -> None:
    for deep in (b"[" * 10_000 + b"]" * 10_000, b'{"a":' * 10_000 + b"1" + b"}" * 10_000):
        _refused(_post(backend, path, b'{"tasks": %s}' % deep), 400, "nested too deeply")
    # This can be read here, but is deeper than the stacks of other readers allow.
    deep = b"[" * 400 + b"]" * 400
    _refused(_post(backend, path, b'{"tasks": %s}' % deep), 400, "nested too deeply")
    for number in (b"NaN", b"-Infinity", b"1e999"):
        _refused(_post(backend, path, b'{"tasks": [%s]}' % number), 400, "not finite")
    _refused(_post(backend, path, b'{"tasks": "\\u0000"}'), 400, "NUL")
    _refused(_post(backend, path, '{"tasks": "\\ud800"}'.encode("utf-16")), 400, "JSON")
    # A length above the limit is refused before the body arrives; chunks are counted.
    limit = "ML_BACKEND_MAX_REQUEST_BYTES"
    connection = http.client.HTTPConnection("127.0.0.1", backend.port, timeout=60)
    connection.putrequest("POST", path)
    connection.putheader("Content-Length", str(LIMIT + 1))
    connection.putheader("Authorization", requests.auth._basic_auth_str(*backend.auth or ("", "")))
    connection.putheader(SECRET_HEADER, SECRETS["ML_BACKEND_WEBHOOK_SECRET"])
    connection.endheaders()
    told = connection.getresponse()
    assert (told.status, limit.encode() in told.read()) == (413, True)
    connection.close()
    chunks = (b" " * 1_000_000 for _ in range(LIMIT // 1_000_000 + 1))
    _refused(_post(backend, path, chunks), 413, limit)


def test_body_of_millions_of_objects_is_refused_at_once(backend: RunningBackend) -> None:
    started = time.monotonic()
    many = b'{"tasks": [' + b"{}," * 1_100_000 + b"{}]}"
    _refused(_post(backend, "/predict", many), 400, "1,000,000 objects")
    _refused(_post(backend, "/webhook", many.replace(b"{}", b"[]")), 400, "1,000,000 objects")
    # The refusal takes a fraction of a second; parsing the body took half a minute.
    assert time.monotonic() - started < 15


def test_error_quoting_control_characters_is_a_valid_answer(
    backend: RunningBackend,
) -> None:
    _refused(_post(backend, "/job_status", b'{"job": "\\u0001\\u007f\\u0085"}'), 400)


@pytest.mark.parametrize("size", ["zz", "-1", "5\r\n{}"])
def test_body_in_broken_chunks_is_refused(backend: RunningBackend, size: str) -> None:
    with socket.create_connection(("127.0.0.1", backend.port), timeout=60) as client:
        secret = f"{SECRET_HEADER}: {SECRETS['ML_BACKEND_WEBHOOK_SECRET']}\r\n"
        client.sendall(
            f"POST /webhook HTTP/1.1\r\nHost: x\r\n{secret}Transfer-Encoding: chunked\r\n\r\n"
            f"{size}\r\n".encode()
        )
        client.shutdown(socket.SHUT_WR)
        assert client.recv(4096).startswith(b"HTTP/1.1 400 the body did not arrive whole")


def test_request_from_a_web_page_is_refused(backend: RunningBackend) -> None:
    for origin in (backend.url, "https://evil.example", "null"):
        answer = requests.post(
            f"{backend.url}/setup",
            data=json.dumps({"project": KEY, "hostname": "http://evil.example"}),
            headers={"Origin": origin, "Content-Type": "text/plain"},
            auth=backend.auth,
            timeout=30,
        )
        _refused(answer, 403, "web pages")


def test_server_silent_clients_keeps_threads_for_others(backend: RunningBackend) -> None:
    head = b"POST /webhook HTTP/1.1\r\nHost: x\r\n"
    secret = f"{SECRET_HEADER}: {SECRETS['ML_BACKEND_WEBHOOK_SECRET']}\r\n".encode()
    clients = [socket.create_connection(("127.0.0.1", backend.port)) for _ in range(8)]
    try:
        for number, client in enumerate(clients):
            # Half fall silent within the head, half within the body: two for each thread.
            body = secret + b"Content-Length: 100\r\n\r\n{" if number % 2 else b""
            client.sendall(head + body)
        time.sleep(1)
        # The server closes their connections after ten seconds.
        assert requests.get(f"{backend.url}/health", timeout=30).ok
    finally:
        for client in clients:
            client.close()


# Annotations


def test_webhook_impossible_boxes_are_stored_and_not_learned_from(
    backend: RunningBackend,
) -> None:
    wrong = [
        _region(1, x=-50, y=-50, width=20, height=20),
        _region(2, width=0),
        _region(4, x=1e300, width=1e300),
        _region(5, rectanglelabels=["Unknown"]),
        _region(6, rectanglelabels=[["RBC"]]),
        _region(7, x="left"),
        _region(9, x=None),
        {"id": "r10", "from_name": "label", "to_name": "image"},
    ]
    # Drawn upwards, turned often, beyond the edge, the same id three times: these are boxes.
    kept = [
        _region(11, x=90, width=1e6),
        _region(11),
        _region(11),
        _region(12, height=-10),
        _region(13, rotation=1e308),
    ]
    hook = _hook(501, [*wrong, *kept, 5, None, "x", []])
    assert _post(backend, "/webhook", json.dumps(hook).encode()).json() == {
        "status": "stored",
        "changed": 1,
    }
    stored = _stored(backend, 501)
    assert stored == hook["annotation"]["result"]
    read = parse_label_config(CONFIG).controls[0].read_regions(stored)
    assert [box.region_id for box in read.regions] == ["r11", "r11", "r11", "r12", "r13"]
    assert all(0 <= box.x1 < box.x2 <= 1 and 0 <= box.y1 < box.y2 <= 1 for box in read.regions)
    assert read.regions[0].x2 == 1
    assert len(read.dropped) == len(wrong)


def test_webhook_hundred_thousand_regions_twice_are_stored_once(
    backend: RunningBackend,
) -> None:
    region = _region(0)
    result = [{**region, "id": f"r{number}"} for number in range(100_000)]
    hook = _hook(502, result)
    # The event holds the annotation twice, once in an older state.
    older = {**hook["annotation"], "result": [], "updated_at": "2020-01-01T00:00:00Z"}
    hook |= {"action": "ANNOTATIONS_CREATED", "annotation": [hook["annotation"], older]}
    hook["task"] = [hook["task"], hook["task"]]
    body = json.dumps(hook).encode()
    assert len(body) < LIMIT
    assert _post(backend, "/webhook", body).json() == {"status": "stored", "changed": 1}
    assert _post(backend, "/webhook", body).json() == {"status": "stored", "changed": 0}
    assert _stored(backend, 502) == result


# Label configs


# Expands to ten to the ninth letters.
BOMB = "".join(f'<!ENTITY {chr(98 + n)} "{f"&{chr(97 + n)};" * 10}">' for n in range(8))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ("<View", "not valid XML"),
        ("<View></Vew>", "not valid XML"),
        (f'<!DOCTYPE v [<!ENTITY a "{"a" * 10}">{BOMB}]><View>&i;</View>', "entities"),
        ('<!DOCTYPE v [<!ENTITY a SYSTEM "file:///etc/hostname">]><View>&a;</View>', "entities"),
        ("<View>" * 100_000, "label config"),
        (CONFIG.replace("</View>", f"<!--{'x' * 1_000_000}--></View>"), "1,000,000 characters"),
        (CONFIG.replace("RBC", "\x01"), "not valid XML"),
    ],
    ids=["open", "unbalanced", "bomb", "external", "deep", "huge", "control character"],
)
def test_label_config_invalid_is_refused_and_not_stored(
    backend: RunningBackend, config: str, says: str
) -> None:
    for path, field in (("/setup", "schema"), ("/predict", "label_config")):
        body = {"project": KEY, field: config, "tasks": [{"id": 1, "data": {}}]}
        _refused(_post(backend, path, json.dumps(body).encode()), 400, says)
    _refused(_post(backend, "/validate", json.dumps({"label_config": config}).encode()), 400, says)
    # The stored config is unchanged: a request without one is predicted with it.
    known = _post(backend, "/predict", json.dumps({"project": KEY, "tasks": [{"id": 1}]}).encode())
    assert known.json() == {"results": [[]], "model_version": "v1"}
