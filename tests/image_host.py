"""Run a host of images that answers as a test says: well, badly, or without end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

CONTENT = b"\x89PNG not really, but bytes are bytes \x00\xff" * 20

Answer = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    """Answer the requests of one connection."""

    protocol_version = "HTTP/1.1"
    server: ImageHost

    def do_GET(self) -> None:
        self.server.seen.append((self.path, self.headers.get("Authorization")))
        answer = self.server.answers.get(urlsplit(self.path).path, empty(404))
        # Some tests let the client close the connection in the middle of an answer.
        with suppress(OSError):
            answer(self)

    def log_message(self, format: str, *args: object) -> None:
        pass


class ImageHost(ThreadingHTTPServer):
    """Answer requests by their path.

    Args:
        address: host and port where it listens; port 0 takes a free one.

    Attributes:
        answers: the answer for each path; other paths are answered 404.
        seen: path and `Authorization` of each request.
        connections: number of connections so far.
        closing: set when the host ends, so that endless answers end too.
    """

    daemon_threads = True

    def __init__(self, address: tuple[str, int] = ("127.0.0.1", 0)) -> None:
        super().__init__(address, Handler)
        self.answers: dict[str, Answer] = {}
        self.seen: list[tuple[str, str | None]] = []
        self.connections = 0
        self.closing = threading.Event()

    def verify_request(self, request: object, client_address: object) -> bool:
        """Count a connection, even if it carries no request."""
        self.connections += 1
        return True

    @property
    def url(self) -> str:
        """The host's address."""
        return f"http://{self.server_address[0]!s}:{self.server_port}"

    @property
    def tokens(self) -> list[str | None]:
        """The `Authorization` of each request."""
        return [token for _, token in self.seen]


@contextmanager
def image_host(address: tuple[str, int] = ("127.0.0.1", 0)) -> Iterator[ImageHost]:
    """Run a host of images while the context lasts; end its open answers with it."""
    with ImageHost(address) as host:
        threading.Thread(target=host.serve_forever, args=(0.02,), daemon=True).start()
        yield host
        host.closing.set()
        host.shutdown()


def sent(content: bytes = CONTENT, **headers: str) -> Answer:
    """Return an answer with these bytes and headers."""

    def answer(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(content)

    return answer


def until_closed(content: bytes) -> Answer:
    """Return an answer without Content-Length, which ends with the connection."""

    def answer(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Connection", "close")
        handler.end_headers()
        handler.wfile.write(content)

    return answer


def endless(handler: Handler) -> None:
    """Send chunks without end."""
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    while not handler.server.closing.is_set():
        handler.wfile.write(b"400\r\n" + b"x" * 1024 + b"\r\n")


def empty(status: int) -> Answer:
    """Return an answer with a status and no body."""

    def answer(handler: Handler) -> None:
        handler.send_response(status)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return answer


def redirect(location: str, status: int = 302) -> Answer:
    """Return an answer that redirects to an address."""

    def answer(handler: Handler) -> None:
        handler.send_response(status)
        handler.send_header("Location", location)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return answer


def drip(handler: Handler) -> None:
    """Send a byte at a time, for 50 s."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    for _ in range(1000):
        handler.wfile.write(b"x")
        if handler.server.closing.wait(0.05):
            return


def stall(handler: Handler) -> None:
    """Send half of the body, and then nothing for 50 s."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b"x" * 500)
    handler.server.closing.wait(50)


def silence(handler: Handler) -> None:
    """Read the request and send nothing for 50 s."""
    handler.server.closing.wait(50)
