"""Run moto's S3 server for tests, in a process of its own."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import requests

from tests.conftest import wait_for


class S3Server:
    """An S3 server that runs, without a bucket at first.

    Args:
        port: a free port.
    """

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-p", str(port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_for(self._answers, within=60, what="the S3 server answers")

    def environ(self) -> dict[str, str]:
        """Return the environment variables of a program that uses the server."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "tests",
            "AWS_SECRET_ACCESS_KEY": "tests",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def make_bucket(self, name: str) -> str:
        """Make an empty bucket; return its URL."""
        requests.put(f"{self.url}/{name}", timeout=10).raise_for_status()
        return f"s3://{name}"

    def check_credentials(self, check: bool) -> None:
        """Turn the check of access keys on or off; the server knows no valid key."""
        requests.post(
            f"{self.url}/moto-api/reset-auth", data=b"0" if check else b"inf", timeout=10
        ).raise_for_status()

    def stop(self) -> None:
        """End the server; its buckets are lost."""
        self._process.kill()
        self._process.wait()

    def _answers(self) -> bool:
        if self._process.poll() is not None:
            raise AssertionError("the S3 server has ended")
        try:
            return requests.get(f"{self.url}/moto-api/", timeout=5).ok
        except requests.ConnectionError:
            return False


@contextmanager
def running_s3() -> Iterator[S3Server]:
    """Run a server while the context lasts."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = S3Server(port)
    try:
        yield server
    finally:
        server.stop()
