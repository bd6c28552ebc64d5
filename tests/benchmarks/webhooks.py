"""Sends webhooks as Label Studio does, one connection for each."""

from __future__ import annotations

import http.client
import json
import time
from typing import Any

from tests.conftest import RunningBackend


def send_webhook(backend: RunningBackend, body: dict[str, Any]) -> float:
    """Seconds until a webhook is acknowledged.

    Raises:
        RuntimeError: it is not.
    """
    content = json.dumps(body).encode()
    began = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", backend.port, timeout=60)
    connection.request("POST", "/webhook", content, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    answer.read()
    taken = time.perf_counter() - began
    connection.close()
    if answer.status != 200:
        raise RuntimeError(f"a webhook was lost: {answer.status} {answer.reason}")
    return taken
