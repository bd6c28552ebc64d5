"""Label Studio's API, as much of it as the loop needs.

The SDK exchanges tokens; the requests are made here, because its typed answers cost time on
large pages and leave out fields.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import requests
from label_studio_sdk import LabelStudio
from label_studio_sdk.core.api_error import ApiError
from urllib3.util import Retry

from ml_backend.label_studio.connections import DeadlineAdapter
from ml_backend.label_studio.events import (
    InvalidEvent,
    PredictionInfo,
    ProjectInfo,
    read_prediction,
    read_project,
)

GUARD = (
    "set ML_BLOCK_LOCAL_IP=false and SSRF_PROTECTION_ENABLED=false on the Label Studio side and "
    "restart it: by default it refuses private and loopback addresses"
)
_TIMEOUT = (3.05, 60)
_QUICK_TIMEOUT = (3.05, 20)
"""A server that is asked for predictions may have to ask first: Label Studio waits 100 s for it."""
_PATIENCE = 2
"""Times its timeout that an answer may take in all, which begins within it."""
_LONGEST_PAUSE = 60.0
_PAGE = 500
_IMPORT = 1000
_IMPORT_TIMEOUT = (3.05, 600)
"""With each import Label Studio counts anew for every task of the project that is predicted: at
100,000 tasks that takes it a minute or more, so there are few of them, and they get their time."""


class LabelStudioError(RuntimeError):
    """Label Studio could not do what was asked; the text says why, and what helps."""


class Passing(LabelStudioError):
    """It may be otherwise later, by itself or by an admin's hand: the same is asked again then.

    Attributes:
        kind: what is wrong, in a word.
    """

    kind = ""


class Unreachable(Passing):
    """Nothing answers at its address, or not in time."""

    kind = "unreachable"


class Failed(Passing):
    """It answers that it failed (a status of 500 or more)."""

    kind = "failed"


class Unauthorized(Passing):
    """It does not take the token."""

    kind = "unauthorized"


class Forbidden(LabelStudioError):
    """It refuses."""


class NotFound(LabelStudioError):
    """It has no such thing, or the token's user may not see it."""


class Rejected(LabelStudioError):
    """It finds something wrong with what was sent."""


class BadAnswer(Passing):
    """What it answers is not what Label Studio answers."""

    kind = "bad answer"


class LabelStudioClient:
    """One Label Studio, seen by one user. Safe to use from several threads.

    Args:
        url: its address, with its sub-path where it has one.
        token: a legacy token, or a personal access token.
        on_outcome: told of each request whether it was answered (None), or what was wrong.
    """

    def __init__(
        self,
        url: str,
        token: str,
        on_outcome: Callable[[Passing | None], None] = lambda _: None,
    ) -> None:
        self.url = url.rstrip("/")
        self.token = token
        self._tell = on_outcome
        self._misses = 0
        self._ask_again = 0.0
        self._sdk: LabelStudio | None = None
        self._lock = threading.Lock()
        self._local = threading.local()

    @property
    def _adapter(self) -> DeadlineAdapter:
        # requests does not promise that a session may be shared by threads.
        if not hasattr(self._local, "adapter"):
            self._local.adapter = DeadlineAdapter(
                max_retries=Retry(
                    total=2,
                    # One that takes a request and does not answer is not worth a third.
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

    def auth_headers(self) -> dict[str, str]:
        """The `Authorization` header: `Token …`, or a fresh `Bearer …` for a personal token.

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
                if self._sdk is None:
                    self._sdk = LabelStudio(  # type: ignore[no-untyped-call]
                        base_url=self.url, api_key=self.token, timeout=30
                    )
                sdk = self._sdk
            headers = sdk._client_wrapper.get_headers()
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
            # Something else than JSON, with whatever status.
            raise BadAnswer(
                f"{self.url} exchanges no token: is LABEL_STUDIO_URL Label Studio's address, "
                "sub-path included?"
            ) from error
        except Exception as error:
            # The SDK lets errors of its HTTP library through.
            raise Unreachable(f"{self.url} cannot exchange the token: {error}") from error
        return {"Authorization": headers["Authorization"]}

    def refresh_auth(self) -> None:
        """Forgets the exchanged token, so that the next request gets a fresh one."""
        with self._lock:
            self._sdk = None

    def version(self) -> str:
        """Label Studio's version; needs no token."""
        answer = self._request("GET", "/api/version", authorize=False, timeout=_QUICK_TIMEOUT)
        return str(answer.get("release") or answer.get("label-studio-os-package", {}))

    def whoami(self) -> dict[str, Any]:
        """The token's user."""
        return dict(self._request("GET", "/api/current-user/whoami"))

    def project(self, number: int) -> ProjectInfo:
        """A project."""
        try:
            return read_project(
                self._request("GET", f"/api/projects/{number}/", timeout=_QUICK_TIMEOUT)
            )
        except InvalidEvent as error:
            raise BadAnswer(f"{self.url}: project {number}: {error}") from error

    def update_project(self, number: int, **fields: Any) -> None:
        """Changes fields of a project."""
        self._request("PATCH", f"/api/projects/{number}/", body=fields)

    def annotated_tasks(
        self, project: int, *, changed_since: datetime | None
    ) -> Iterator[list[dict[str, Any]]]:
        """Pages of tasks with their annotations, in the order of their ids.

        Args:
            project: its id.
            changed_since: only tasks that changed since then, annotated or not; where None, all
                that are annotated.
        """
        if changed_since is None:
            condition = _filter("total_annotations", "greater", "Number", 0)
        else:
            moment = changed_since.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
            condition = _filter("updated_at", "greater", "Datetime", moment)
        yield from self._pages(project, [condition], {"fields": "all"})

    def annotation_count(self, project: int) -> int:
        """How many annotations a project has, skipped ones left out."""
        answer = self._tasks_page(
            project,
            [_filter("total_annotations", "greater", "Number", 0)],
            {"page_size": 1, "review": "true"},
        )
        return int(answer.get("total_annotations", 0))

    def task_ids(self, project: int) -> Iterator[int]:
        """Ids of the annotated tasks, those left out that have only skipped annotations."""
        condition = _filter("total_annotations", "greater", "Number", 0)
        # `review` keeps Label Studio from asking us for predictions on the way.
        for page in self._pages(project, [condition], {"review": "true"}):
            yield from (int(task["id"]) for task in page)

    def first_task(self, project: int) -> dict[str, Any] | None:
        """Some task of a project."""
        tasks = self._tasks_page(project, [], {"page_size": 1, "review": "true"}).get("tasks", [])
        return tasks[0] if tasks else None

    def tasks(self, project: int, ids: Sequence[int]) -> list[dict[str, Any]]:
        """Those of at most 100 tasks that are there, with annotations and predictions."""
        if not ids:
            return []
        answer = self._tasks_page(
            project,
            [],
            {"page_size": len(ids), "fields": "all"},
            selected={"all": False, "included": list(ids)},
        )
        return list(answer.get("tasks", []))

    def predicted_tasks(self, project: int, version: str, tasks: Sequence[int]) -> set[int]:
        """Those of at most 100 tasks that hold a prediction of a version."""
        return {
            int(task["id"])
            for task in self.tasks(project, tasks)
            if any(p.get("model_version") == version for p in task.get("predictions", []))
        }

    def prediction(self, number: int) -> PredictionInfo:
        """A prediction."""
        try:
            return read_prediction(self._request("GET", f"/api/predictions/{number}/"))
        except InvalidEvent as error:
            raise BadAnswer(f"{self.url}: prediction {number}: {error}") from error

    def unpredicted_tasks(
        self, project: int, version: str, *, after: int, limit: int
    ) -> tuple[list[dict[str, Any]], int]:
        """Tasks without an annotation that hold no prediction of a version, in the order of ids.

        Args:
            project: its id.
            version: the version.
            after: only tasks with a larger id.
            limit: how many at most.

        Returns:
            The tasks, with their data as it stands in Label Studio, and how many there are in all
            beyond `after`.
        """
        answer = self._tasks_page(
            project,
            _unpredicted(version, after),
            # `review` keeps Label Studio from asking us for predictions, and from adding columns
            # that nobody needs here; cloud addresses stay what they are in a request to predict.
            {"page_size": limit, "review": "true", "resolve_uri": "false"},
        )
        return list(answer.get("tasks", [])), int(answer.get("total", 0))

    def unpredicted_task_id(
        self, project: int, version: str, *, after: int, position: int
    ) -> int | None:
        """Finds the id of one of the tasks that `unpredicted_tasks` lists.

        Args:
            project: its id.
            version: the version.
            after: only tasks with a larger id.
            position: of the task among them, from 1.

        Returns:
            The id; None where there are fewer.
        """
        try:
            answer = self._tasks_page(
                project,
                _unpredicted(version, after),
                {"page": position, "page_size": 1, "review": "true", "resolve_uri": "false"},
            )
        except NotFound:
            # Beyond the last page.
            return None
        tasks = answer.get("tasks", [])
        return int(tasks[0]["id"]) if tasks else None

    def predictions(
        self, project: int, version: str, *, doubled: bool = False
    ) -> Iterator[list[dict[str, Any]]]:
        """Pages of the predictions of a version, in the order of their tasks.

        Args:
            project: its id.
            version: the version.
            doubled: only where the task holds several predictions, of whatever version.
        """
        conditions = [_filter("predictions_model_versions", "contains", "List", [version])]
        if doubled:
            conditions.append(_filter("total_predictions", "greater", "Number", 1))
        for page in self._pages(project, conditions, {"fields": "all"}):
            # The filter finds parts of names as well, and a task once for each prediction.
            found = {p["id"]: p for task in page for p in task["predictions"]}
            yield [p for p in found.values() if p["model_version"] == version]

    def prediction_counts(self, project: int) -> dict[str, int]:
        """How many predictions of each version a project holds."""
        return dict(self._request("GET", f"/api/projects/{project}/model-versions/"))

    def delete_prediction(self, number: int) -> None:
        """Deletes a prediction; annotations that began with it stay."""
        self._request("DELETE", f"/api/predictions/{number}/")

    def import_predictions(self, project: int, predictions: Sequence[Mapping[str, Any]]) -> int:
        """Imports predictions, 1,000 at a time; answers how many went in.

        Label Studio rejects a whole list for one task that it no longer has: such a list is
        halved until the others are in.
        """
        imported = 0
        for start in range(0, len(predictions), _IMPORT):
            imported += self._import(project, list(predictions[start : start + _IMPORT]))
        return imported

    def ml_backends(self, project: int) -> list[dict[str, Any]]:
        """The ML backends that are connected to a project."""
        return list(self._request("GET", "/api/ml/", params={"project": project}))

    def add_ml_backend(self, **fields: Any) -> dict[str, Any]:
        """Connects an ML backend; Label Studio asks its `/health` and `/setup` meanwhile."""
        return dict(self._request("POST", "/api/ml/", body=fields))

    def update_ml_backend(self, number: int, **fields: Any) -> dict[str, Any]:
        """Changes a connection; Label Studio asks `/health` and `/setup` again."""
        return dict(self._request("PATCH", f"/api/ml/{number}", body=fields))

    def delete_ml_backend(self, number: int) -> None:
        """Removes a connection; its webhook stays behind."""
        self._request("DELETE", f"/api/ml/{number}")

    def webhooks(self, project: int) -> list[dict[str, Any]]:
        """The webhooks of a project."""
        return list(self._request("GET", "/api/webhooks/", params={"project": project}))

    def create_webhook(self, **fields: Any) -> None:
        """Creates a webhook."""
        self._request("POST", "/api/webhooks/", body=fields)

    def update_webhook(self, number: int, **fields: Any) -> None:
        """Changes a webhook."""
        self._request("PATCH", f"/api/webhooks/{number}/", body=fields)

    def delete_webhook(self, number: int) -> None:
        """Deletes a webhook."""
        self._request("DELETE", f"/api/webhooks/{number}/")

    def _import(self, project: int, predictions: list[Mapping[str, Any]]) -> int:
        if not predictions:
            return 0
        try:
            self._request(
                "POST",
                f"/api/projects/{project}/import/predictions",
                body=predictions,
                timeout=_IMPORT_TIMEOUT,
            )
        except Rejected:
            if len(predictions) == 1:
                return 0
            half = len(predictions) // 2
            return self._import(project, predictions[:half]) + self._import(
                project, predictions[half:]
            )
        return len(predictions)

    def _pages(
        self, project: int, conditions: list[dict[str, Any]], params: dict[str, Any]
    ) -> Iterator[list[dict[str, Any]]]:
        """Pages by id, not by number: what is deleted meanwhile moves no task out of sight."""
        last = 0
        while True:
            answer = self._tasks_page(
                project,
                [*conditions, _filter("id", "greater", "Number", last)],
                {**params, "page_size": _PAGE},
            )
            tasks = answer.get("tasks", [])
            if not tasks:
                return
            yield tasks
            if len(tasks) < _PAGE and answer.get("total", 0) <= len(tasks):
                return
            last = int(tasks[-1]["id"])

    def _tasks_page(
        self,
        project: int,
        conditions: list[dict[str, Any]],
        params: dict[str, Any],
        selected: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        query: dict[str, Any] = {
            "filters": {"conjunction": "and", "items": conditions},
            "ordering": ["tasks:id"],
        }
        if selected is not None:
            query["selectedItems"] = selected
        answer = self._request(
            "GET",
            "/api/tasks",
            params={"project": project, "page": 1, "query": json.dumps(query), **params},
        )
        if not isinstance(answer, dict):
            raise BadAnswer(f"{self.url}/api/tasks answers no page of tasks")
        return answer

    def _request(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        body: object = None,
        authorize: bool = True,
        timeout: tuple[float, float] | None = None,
    ) -> Any:
        self._wait_for_none()
        try:
            answer = self._ask(method, path, params, body, authorize, timeout or _TIMEOUT)
        except Passing as failure:
            self._missed(isinstance(failure, Unreachable))
            self._tell(failure)
            raise
        except LabelStudioError:
            self._missed(False)
            self._tell(None)
            raise
        self._missed(False)
        self._tell(None)
        return answer

    def _wait_for_none(self) -> None:
        """Where it did not answer a moment ago, one asks again, and the others are told at once.

        A worker's few threads would otherwise all wait for a Label Studio that takes requests and
        answers none, and a project of another one would wait for them.

        Raises:
            Unreachable: it is not asked.
        """
        with self._lock:
            left = self._ask_again - time.monotonic()
            if left > 0:
                raise Unreachable(
                    f"{self.url} did not answer a moment ago, and is asked again in {left:.0f} s"
                )
            if self._misses:
                self._ask_again = time.monotonic() + self._pause()

    def _missed(self, missed: bool) -> None:
        with self._lock:
            self._misses = self._misses + 1 if missed else 0
            self._ask_again = time.monotonic() + self._pause() if missed else 0.0

    def _pause(self) -> float:
        return min(2.0 ** min(self._misses, 10), _LONGEST_PAUSE)

    def _ask(
        self,
        method: str,
        path: str,
        params: Mapping[str, Any] | None,
        body: object,
        authorize: bool,
        timeout: tuple[float, float],
    ) -> Any:
        for attempt in (1, 2):
            headers = self.auth_headers() if authorize else {}
            try:
                asking = self._adapter
                with asking.within(_PATIENCE * timeout[1]):
                    response = asking.session.request(
                        method,
                        self.url + path,
                        params=params,
                        json=body,
                        headers=headers,
                        timeout=timeout,
                        allow_redirects=False,
                        auth=as_it_is,
                    )
            except requests.RequestException as error:
                raise Unreachable(
                    f"{self.url} does not answer ({type(error).__name__}): check that it runs and "
                    "that LABEL_STUDIO_URL is its address as seen from here"
                ) from error
            if response.status_code == 401 and attempt == 1 and authorize:
                # An exchanged token may have run out a moment ago.
                self.refresh_auth()
                continue
            break
        return self._read(response, f"{method} {path}")

    def _read(self, response: requests.Response, what: str) -> Any:
        status = response.status_code
        if status < 300:
            # Of a question it is no answer: a page of tasks without tasks would bury them all.
            if not response.content and not what.startswith("GET "):
                return {}
            try:
                return response.json()
            except ValueError:
                raise BadAnswer(
                    f"{self.url}: {what} is answered with {_kind(response)} instead of JSON: is "
                    "LABEL_STUDIO_URL Label Studio's address, sub-path included?"
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


def as_it_is(request: requests.PreparedRequest) -> requests.PreparedRequest:
    """Adds no credentials: without it, requests would take some from ~/.netrc."""
    return request


def _unpredicted(version: str, after: int) -> list[dict[str, Any]]:
    """Filters of the tasks without an annotation that hold no prediction of a version."""
    return [
        _filter("total_annotations", "equal", "Number", 0),
        _filter("predictions_model_versions", "not_contains", "List", [version]),
        _filter("id", "greater", "Number", after),
    ]


def _filter(field: str, operator: str, kind: str, value: object) -> dict[str, Any]:
    return {"filter": f"filter:tasks:{field}", "operator": operator, "type": kind, "value": value}


def _json(response: requests.Response) -> object:
    try:
        return response.json()
    except ValueError:
        return _kind(response)


def _kind(response: requests.Response) -> str:
    return response.headers.get("Content-Type", "no content type").split(";")[0]


def _detail(body: object) -> str:
    """What an error's body says, in one line."""
    if isinstance(body, dict):
        inner = body.get("validation_errors") or body.get("detail") or body
        return inner if isinstance(inner, str) else json.dumps(inner)[:500]
    return str(body)[:500]
