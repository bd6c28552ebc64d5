"""Stops requests to a server that does not answer.

pybreaker was considered: it holds its lock during the call, so that threads would take turns, and
its pause has one length.
"""

from __future__ import annotations

import threading
import time

_LONGEST_PAUSE = 60.0


class CircuitBreaker:
    """Lets a single request through at a time while a server does not answer.

    Without it, all threads of a worker would wait for a server that accepts requests and never
    answers. After each unanswered request the pause doubles, up to a minute; during the pause no
    request is allowed, after it one. Safe to use from several threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._unanswered = 0
        self._open_until = 0.0

    def remaining(self) -> float:
        """Asks to make a request.

        Returns:
            0 if the request may be made now; `record` must be called after it. Otherwise the
            seconds until the next one is allowed.
        """
        with self._lock:
            left = self._open_until - time.monotonic()
            if left > 0:
                return left
            if self._unanswered:
                # Other threads do not ask before this request has ended.
                self._open_until = time.monotonic() + self._pause()
            return 0.0

    def record(self, *, answered: bool) -> None:
        """Notes whether a request was answered, in whatever way."""
        with self._lock:
            self._unanswered = 0 if answered else self._unanswered + 1
            self._open_until = 0.0 if answered else time.monotonic() + self._pause()

    def _pause(self) -> float:
        return min(2.0 ** min(self._unanswered, 10), _LONGEST_PAUSE)
