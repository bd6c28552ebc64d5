"""A host of images that answers as it is told: well, badly, or for ever."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

CONTENT = b"\x89PNG not really, but bytes are bytes \x00\xff" * 20

Answer = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    """Answers one connection's requests."""

    protocol_version = "HTTP/1.1"
    server: ImageHost

    def do_GET(self) -> None:
        self.server.seen.append((self.path, self.headers.get("Authorization")))
        answer = self.server.answers.get(urlsplit(self.path).path, empty(404))
        # The client may hang up on us in the middle; that is what some tests are about.
        with suppress(OSError):
            answer(self)

    def log_message(self, format: str, *args: object) -> None:
        pass


class ImageHost(ThreadingHTTPServer):
    """Answers by path; `seen` holds each request's path and `Authorization`, `connections` counts.

    Args:
        address: where it listens; a free port where none is given.
    """

    daemon_threads = True

    def __init__(self, address: tuple[str, int] = ("127.0.0.1", 0)) -> None:
        super().__init__(address, Handler)
        self.answers: dict[str, Answer] = {}
        self.seen: list[tuple[str, str | None]] = []
        self.connections = 0
        self.closing = threading.Event()

    def verify_request(self, request: object, client_address: object) -> bool:
        """Counts a connection, whether or not a request comes over it."""
        self.connections += 1
        return True

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://{self.server_address[0]!s}:{self.server_port}"

    @property
    def tokens(self) -> list[str | None]:
        """Each request's `Authorization`."""
        return [token for _, token in self.seen]


@contextmanager
def image_host(address: tuple[str, int] = ("127.0.0.1", 0)) -> Iterator[ImageHost]:
    """A host of images that runs, and ends whatever it still answers."""
    with ImageHost(address) as host:
        threading.Thread(target=host.serve_forever, args=(0.02,), daemon=True).start()
        yield host
        host.closing.set()
        host.shutdown()


def sent(content: bytes = CONTENT, **headers: str) -> Answer:
    """An answer with these bytes."""

    def answer(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(content)

    return answer


def until_closed(content: bytes) -> Answer:
    """No Content-Length: the end of the connection is the end of the image."""

    def answer(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Connection", "close")
        handler.end_headers()
        handler.wfile.write(content)

    return answer


def endless(handler: Handler) -> None:
    """Chunks without end."""
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    while not handler.server.closing.is_set():
        handler.wfile.write(b"400\r\n" + b"x" * 1024 + b"\r\n")


def empty(status: int) -> Answer:
    """Nothing but a status."""

    def answer(handler: Handler) -> None:
        handler.send_response(status)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return answer


def redirect(location: str, status: int = 302) -> Answer:
    """Points elsewhere."""

    def answer(handler: Handler) -> None:
        handler.send_response(status)
        handler.send_header("Location", location)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return answer


def drip(handler: Handler) -> None:
    """A byte at a time, 50 s in all."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    for _ in range(1000):
        handler.wfile.write(b"x")
        if handler.server.closing.wait(0.05):
            return


def stall(handler: Handler) -> None:
    """Half of it, and then nothing."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b"x" * 500)
    handler.server.closing.wait(50)


def silence(handler: Handler) -> None:
    """Takes the request and never answers."""
    handler.server.closing.wait(50)
