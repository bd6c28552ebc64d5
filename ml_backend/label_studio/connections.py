"""Limits the duration of whole requests.

The timeouts of requests limit the wait for each piece of an answer. A server that sends a byte
every few seconds, within the head or the size of a chunk, would occupy a thread for hours.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool


class DeadlineAdapter(HTTPAdapter):
    """Adapter of requests that can end its connections; for use in one thread.

    Args:
        kwargs: the arguments of requests' `HTTPAdapter`.

    Attributes:
        session: a session that uses this adapter for all requests.
    """

    def __init__(self, **kwargs: Any) -> None:
        self._lock = threading.Lock()
        self._within = self._over = False
        # A second handle on each connection, because TLS detaches the first one.
        self._open: set[socket.socket] = set()
        self._closed: set[socket.socket] = set()
        super().__init__(**kwargs)
        self.session = requests.Session()
        for scheme in ("http://", "https://"):
            self.session.mount(scheme, self)

    @contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        """Ends all requests made in this context after a time.

        Args:
            seconds: the time.

        Raises:
            requests.Timeout: the time was over. Raised even if the request seemed to succeed,
                because a head that is cut off reads like a whole one.
        """
        timer = threading.Timer(seconds, self._cut)
        timer.daemon = True
        self._within, self._over = True, False
        timer.start()
        late = requests.Timeout(f"it took longer than {seconds:g} s")
        try:
            yield
        except Exception as error:
            if self._over:
                raise late from error
            raise
        finally:
            timer.cancel()
            with self._lock:
                over = self._over
                self._within = self._over = False
                for handle in self._closed:
                    handle.close()
                self._open -= self._closed
                self._closed.clear()
        if over:
            raise late

    def connect(self, scheme: str, connection: HTTPConnection) -> socket.socket | None:
        """Opens a connection; returns None to let urllib3 open it. Subclasses override this.

        Args:
            scheme: `http` or `https`.
            connection: holds host, port and timeout.
        """
        return None

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        """Creates the pools, with connections that this adapter can end."""
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = _pools(self)

    def proxy_manager_for(self, *args: Any, **kwargs: Any) -> Any:
        """Creates the pools of a proxy, with connections that this adapter can end."""
        manager = super().proxy_manager_for(*args, **kwargs)
        manager.pool_classes_by_scheme = _pools(self)
        return manager

    def opened(self, connected: socket.socket) -> socket.socket:
        """Keeps a second handle on a new connection, and returns the handle.

        Raises:
            OSError: the time of the request is over.
        """
        with self._lock:
            if self._over:
                connected.close()
                raise TimeoutError("the time for this request is over")
            handle = connected.dup()
            self._open.add(handle)
        return handle

    def closed(self, handle: socket.socket) -> None:
        """Notes that a connection was closed; its answer may still be read."""
        with self._lock:
            if self._within:
                self._closed.add(handle)
            else:
                self._open.discard(handle)
                handle.close()

    def _cut(self) -> None:
        with self._lock:
            if self._within:
                self._over = True
                for handle in self._open:
                    # The server may have closed the connection.
                    with suppress(OSError):
                        handle.shutdown(socket.SHUT_RDWR)


def _pools(adapter: DeadlineAdapter) -> dict[str, type[HTTPConnectionPool]]:
    class Known(HTTPConnection):
        scheme = "http"
        handle: socket.socket | None = None

        def _new_conn(self) -> socket.socket:
            # The proxy itself may have any address.
            connected = None if self.proxy else adapter.connect(self.scheme, self)
            connected = connected or super()._new_conn()
            self.handle = adapter.opened(connected)
            return connected

        def close(self) -> None:
            super().close()
            if self.handle is not None:
                adapter.closed(self.handle)
                self.handle = None

    class KnownByTls(Known, HTTPSConnection):
        scheme = "https"

    class Plain(HTTPConnectionPool):
        ConnectionCls = Known

    class Encrypted(HTTPSConnectionPool):
        ConnectionCls = KnownByTls

    return {"http": Plain, "https": Encrypted}
