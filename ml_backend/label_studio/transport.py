"""Requests to Label Studio: authorisation, time limits, retries, and what an answer means.

label-studio-sdk exchanges tokens. The requests are made here, because the SDK's typed answers are
slow for large pages and leave out fields.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from typing import Any

import httpx
import requests
from label_studio_sdk.core.api_error import ApiError
from label_studio_sdk.core.client_wrapper import SyncClientWrapper
from urllib3.util import Retry

from ml_backend.label_studio.circuit_breaker import CircuitBreaker
from ml_backend.label_studio.connections import DeadlineAdapter
from ml_backend.label_studio.errors import (
    GUARD,
    BadAnswer,
    Failed,
    Forbidden,
    LabelStudioError,
    NotFound,
    Passing,
    Rejected,
    Unauthorized,
    Unreachable,
)

Timeout = tuple[float, float]
"""Seconds for the connection, and for each piece of the answer."""

_TIMEOUT: Timeout = (3.05, 60)
_WHOLE_ANSWER = 2
"""The time limit of a whole answer, as a multiple of the limit of a piece."""
_EXCHANGE_TIMEOUT = 30.0


class Transport:
    """Makes requests to one Label Studio for one user. Safe to use from several threads.

    Args:
        url: Label Studio's address, including its sub-path if it has one.
        token: a legacy token, or a personal access token.
        on_outcome: called after each request: with None if it was answered, else with the fault.
    """

    def __init__(self, url: str, token: str, on_outcome: Callable[[Passing | None], None]) -> None:
        self.url = url.rstrip("/")
        self.token = token
        self._on_outcome = on_outcome
        self._breaker = CircuitBreaker()
        self._tokens: SyncClientWrapper | None = None
        self._lock = threading.Lock()
        self._local = threading.local()

    def request(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        body: object = None,
        authorize: bool = True,
        timeout: Timeout | None = None,
    ) -> Any:
        """Makes a request, and answers the JSON of the response.

        Args:
            method: the HTTP method. A GET is tried again after a fault of the connection and after
                the statuses 502, 503 and 504.
            path: the path below Label Studio's address.
            params: the query.
            body: the content, as JSON.
            authorize: whether the token is sent.
            timeout: limits of this request; None for the usual ones.

        Raises:
            LabelStudioError: there is no answer, or it is an error.
        """
        left = self._breaker.remaining()
        if left:
            raise Unreachable(
                f"{self.url} did not answer a moment ago, and is asked again in {left:.0f} s"
            )
        try:
            answer = self._send(method, path, params, body, authorize, timeout or _TIMEOUT)
        except Passing as failure:
            self._breaker.record(answered=not isinstance(failure, Unreachable))
            self._on_outcome(failure)
            raise
        except LabelStudioError:
            self._breaker.record(answered=True)
            self._on_outcome(None)
            raise
        self._breaker.record(answered=True)
        self._on_outcome(None)
        return answer

    def auth_headers(self) -> dict[str, str]:
        """Makes the `Authorization` header: `Token …`, or a fresh `Bearer …` for a personal token.

        Raises:
            LabelStudioError: the token has expired, or cannot be exchanged.
        """
        if not (self.token.isascii() and self.token.isprintable()):
            raise Unauthorized(
                f"{self.url}: LABEL_STUDIO_API_KEY holds letters that no token has: copy it anew "
                "from Account & Settings"
            )
        try:
            with self._lock:
                if self._tokens is None:
                    self._tokens = SyncClientWrapper(
                        base_url=self.url,
                        api_key=self.token,
                        timeout=_EXCHANGE_TIMEOUT,
                        httpx_client=httpx.Client(timeout=_EXCHANGE_TIMEOUT, follow_redirects=True),
                    )
                tokens = self._tokens
            headers = tokens.get_headers()
        except ApiError as error:
            status = error.status_code or 0
            if status >= 500:
                raise Failed(
                    f"{self.url} cannot exchange the token: status {status}: {_detail(error.body)}"
                ) from error
            raise Unauthorized(
                f"{self.url} does not take LABEL_STUDIO_API_KEY ({_detail(error.body)}): get a "
                "new token under Account & Settings"
            ) from error
        except ValueError as error:
            # The answer is not JSON, whatever its status.
            raise BadAnswer(
                f"{self.url} exchanges no token: is LABEL_STUDIO_URL Label Studio's address, "
                "sub-path included?"
            ) from error
        except Exception as error:
            # The SDK passes on the errors of its HTTP library.
            raise Unreachable(f"{self.url} cannot exchange the token: {error}") from error
        return {"Authorization": headers["Authorization"]}

    def refresh_auth(self) -> None:
        """Discards the exchanged token, so that the next request gets a fresh one."""
        with self._lock:
            self._tokens = None

    @property
    def _adapter(self) -> DeadlineAdapter:
        # requests does not promise that threads may share a session.
        if not hasattr(self._local, "adapter"):
            self._local.adapter = DeadlineAdapter(
                max_retries=Retry(
                    total=2,
                    # A server that accepts requests and does not answer is not asked a third time.
                    read=1,
                    backoff_factor=0.5,
                    status_forcelist=(502, 503, 504),
                    allowed_methods=("GET",),
                    raise_on_status=False,
                )
            )
        adapter = self._local.adapter
        assert isinstance(adapter, DeadlineAdapter)
        return adapter

    def _send(
        self,
        method: str,
        path: str,
        params: Mapping[str, Any] | None,
        body: object,
        authorize: bool,
        timeout: Timeout,
    ) -> Any:
        for attempt in (1, 2):
            headers = self.auth_headers() if authorize else {}
            try:
                adapter = self._adapter
                with adapter.within(_WHOLE_ANSWER * timeout[1]):
                    response = adapter.session.request(
                        method,
                        self.url + path,
                        params=params,
                        json=body,
                        headers=headers,
                        timeout=timeout,
                        allow_redirects=False,
                        auth=without_netrc,
                    )
            except requests.RequestException as error:
                raise Unreachable(
                    f"{self.url} does not answer ({type(error).__name__}): check that it runs and "
                    "that LABEL_STUDIO_URL is its address as seen from here"
                ) from error
            if response.status_code == 401 and attempt == 1 and authorize:
                # The exchanged token may have expired a moment ago.
                self.refresh_auth()
                continue
            break
        return self._read(response, f"{method} {path}")

    def _read(self, response: requests.Response, what: str) -> Any:
        status = response.status_code
        if status < 300:
            # An empty answer to a GET is an error: read as a page without tasks, it would mark all
            # tasks as deleted.
            if not response.content and not what.startswith("GET "):
                return {}
            try:
                return response.json()
            except ValueError:
                raise BadAnswer(
                    f"{self.url}: {what} is answered with {_content_type(response)} instead of "
                    "JSON: is LABEL_STUDIO_URL Label Studio's address, sub-path included?"
                ) from None
        detail = _detail(_json(response))
        if status in (301, 302, 303, 307, 308):
            raise BadAnswer(
                f"{self.url}: {what} is redirected to {response.headers.get('Location', '?')}: "
                "set LABEL_STUDIO_URL to the address that it redirects to"
            )
        if status == 401:
            kind = "personal access token" if self.token.count(".") == 2 else "legacy token"
            raise Unauthorized(
                f"{self.url} does not take the {kind} ({detail}): new installations have legacy "
                "tokens switched off, so use a personal access token, or get a new one under "
                "Account & Settings"
            )
        if status == 403:
            remedy = f": {GUARD}" if "reserved network address" in detail else ""
            raise Forbidden(f"{self.url}: {what} is forbidden: {detail}{remedy}")
        if status == 404:
            raise NotFound(
                f"{self.url}: {what}: there is no such thing, or the token's user may not see it"
            )
        if status < 500:
            raise Rejected(f"{self.url}: {what} is rejected: {detail}")
        raise Failed(f"{self.url}: {what} failed with status {status}: {detail}")


def without_netrc(request: requests.PreparedRequest) -> requests.PreparedRequest:
    """Leaves a request as it is; without an `auth`, requests would use credentials of ~/.netrc."""
    return request


def _json(response: requests.Response) -> object:
    try:
        return response.json()
    except ValueError:
        return _content_type(response)


def _content_type(response: requests.Response) -> str:
    return response.headers.get("Content-Type", "no content type").split(";")[0]


def _detail(body: object) -> str:
    """The message in an error's body, in one line."""
    if isinstance(body, dict):
        inner = body.get("validation_errors") or body.get("detail") or body
        return inner if isinstance(inner, str) else json.dumps(inner)[:500]
    return str(body)[:500]
