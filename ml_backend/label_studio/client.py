"""The parts of Label Studio's API that the backend uses."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from ml_backend.label_studio.errors import (
    BadAnswer,
    NotFound,
    Passing,
    Rejected,
)
from ml_backend.label_studio.events import (
    InvalidEvent,
    PredictionInfo,
    ProjectInfo,
    read_prediction,
    read_project,
)
from ml_backend.label_studio.transport import Timeout, Transport

_QUICK_TIMEOUT: Timeout = (3.05, 20)
"""For requests made while Label Studio waits for predictions, which takes at most 100 s."""
_PAGE = 500
_IMPORT = 1000
_IMPORT_TIMEOUT: Timeout = (3.05, 600)
"""With each import Label Studio counts anew the predictions of every task of the project that has
one: a minute or more at 100,000 tasks. So imports are few, and have a long limit."""


class LabelStudioClient:
    """Client of one Label Studio for one user. Safe to use from several threads.

    Every method that makes a request raises a `LabelStudioError` if it fails.

    Args:
        url: Label Studio's address, including its sub-path if it has one.
        token: a legacy token, or a personal access token.
        on_outcome: called after each request: with None if it was answered, else with the fault.
    """

    def __init__(
        self,
        url: str,
        token: str,
        on_outcome: Callable[[Passing | None], None] = lambda _: None,
    ) -> None:
        self._transport = Transport(url, token, on_outcome)
        self.url = self._transport.url
        self.token = token

    def auth_headers(self) -> dict[str, str]:
        """Makes the `Authorization` header: `Token …`, or a fresh `Bearer …` for a personal token.

        Raises:
            LabelStudioError: the token has expired, or cannot be exchanged.
        """
        return self._transport.auth_headers()

    def refresh_auth(self) -> None:
        """Discards the exchanged token, so that the next request gets a fresh one."""
        self._transport.refresh_auth()

    def version(self) -> str:
        """Reads Label Studio's version; needs no token."""
        answer = self._transport.request(
            "GET", "/api/version", authorize=False, timeout=_QUICK_TIMEOUT
        )
        return str(answer.get("release") or answer.get("label-studio-os-package", {}))

    def whoami(self) -> dict[str, Any]:
        """Reads the user that the token belongs to."""
        return dict(self._transport.request("GET", "/api/current-user/whoami"))

    def project(self, number: int) -> ProjectInfo:
        """Reads a project."""
        try:
            return read_project(
                self._transport.request("GET", f"/api/projects/{number}/", timeout=_QUICK_TIMEOUT)
            )
        except InvalidEvent as error:
            raise BadAnswer(f"{self.url}: project {number}: {error}") from error

    def update_project(self, number: int, **fields: Any) -> None:
        """Changes fields of a project."""
        self._transport.request("PATCH", f"/api/projects/{number}/", body=fields)

    def annotated_tasks(
        self, project: int, *, changed_since: datetime | None
    ) -> Iterator[list[dict[str, Any]]]:
        """Reads tasks with their annotations, page by page in the order of their ids.

        Args:
            project: its id.
            changed_since: only tasks that changed since then, annotated or not; if None, all
                annotated tasks.
        """
        if changed_since is None:
            condition = _filter("total_annotations", "greater", "Number", 0)
        else:
            moment = changed_since.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
            condition = _filter("updated_at", "greater", "Datetime", moment)
        yield from self._pages(project, [condition], {"fields": "all"})

    def annotation_count(self, project: int) -> int:
        """Counts the annotations of a project, without skipped ones."""
        answer = self._tasks_page(
            project,
            [_filter("total_annotations", "greater", "Number", 0)],
            {"page_size": 1, "review": "true"},
        )
        return int(answer.get("total_annotations", 0))

    def task_ids(self, project: int) -> Iterator[int]:
        """Reads the ids of the annotated tasks; skipped annotations do not count."""
        condition = _filter("total_annotations", "greater", "Number", 0)
        # With `review`, Label Studio does not ask us for predictions meanwhile.
        for page in self._pages(project, [condition], {"review": "true"}):
            yield from (int(task["id"]) for task in page)

    def first_task(self, project: int) -> dict[str, Any] | None:
        """Reads the task with the lowest id; None if the project has no task."""
        tasks = self._tasks_page(project, [], {"page_size": 1, "review": "true"}).get("tasks", [])
        return tasks[0] if tasks else None

    def tasks(self, project: int, ids: Sequence[int]) -> list[dict[str, Any]]:
        """Reads at most 100 tasks with annotations and predictions; missing ones are left out."""
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
        """Finds those of at most 100 tasks that have a prediction of a version."""
        return {
            int(task["id"])
            for task in self.tasks(project, tasks)
            if any(p.get("model_version") == version for p in task.get("predictions", []))
        }

    def prediction(self, number: int) -> PredictionInfo:
        """Reads a prediction."""
        try:
            return read_prediction(self._transport.request("GET", f"/api/predictions/{number}/"))
        except InvalidEvent as error:
            raise BadAnswer(f"{self.url}: prediction {number}: {error}") from error

    def unpredicted_tasks(
        self, project: int, version: str, *, after: int, limit: int
    ) -> tuple[list[dict[str, Any]], int]:
        """Reads tasks that have no annotation and no prediction of a version, in the order of ids.

        Args:
            project: its id.
            version: the version.
            after: only tasks with a larger id.
            limit: the largest number of tasks.

        Returns:
            The tasks, with their data as Label Studio stores it, and the number of all such tasks
            beyond `after`.
        """
        answer = self._tasks_page(
            project,
            _unpredicted(version, after),
            # With `review`, Label Studio does not ask us for predictions and adds no columns that
            # are not needed. `resolve_uri` leaves cloud addresses as a request to predict has them.
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
        """Reads the predictions of a version, page by page in the order of their tasks.

        Args:
            project: its id.
            version: the version.
            doubled: only of tasks that have several predictions, of any version.
        """
        conditions = [_filter("predictions_model_versions", "contains", "List", [version])]
        if doubled:
            conditions.append(_filter("total_predictions", "greater", "Number", 1))
        for page in self._pages(project, conditions, {"fields": "all"}):
            # The filter also finds versions whose name contains this one, and finds a task once
            # for each of its predictions.
            found = {p["id"]: p for task in page for p in task["predictions"]}
            yield [p for p in found.values() if p["model_version"] == version]

    def prediction_counts(self, project: int) -> dict[str, int]:
        """Counts the predictions of a project, by version."""
        return dict(self._transport.request("GET", f"/api/projects/{project}/model-versions/"))

    def delete_prediction(self, number: int) -> None:
        """Deletes a prediction; annotations that were made from it stay."""
        self._transport.request("DELETE", f"/api/predictions/{number}/")

    def import_predictions(self, project: int, predictions: Sequence[Mapping[str, Any]]) -> int:
        """Imports predictions, 1,000 at a time, and returns the number imported.

        Label Studio rejects a whole list if one of its tasks does not exist. Such a list is halved
        until all others are imported.
        """
        imported = 0
        for start in range(0, len(predictions), _IMPORT):
            imported += self._import(project, list(predictions[start : start + _IMPORT]))
        return imported

    def ml_backends(self, project: int) -> list[dict[str, Any]]:
        """Reads the ML backends that are connected to a project."""
        return list(self._transport.request("GET", "/api/ml/", params={"project": project}))

    def add_ml_backend(self, **fields: Any) -> dict[str, Any]:
        """Connects an ML backend; Label Studio requests its `/health` and `/setup` meanwhile."""
        return dict(self._transport.request("POST", "/api/ml/", body=fields))

    def update_ml_backend(self, number: int, **fields: Any) -> dict[str, Any]:
        """Changes a connection; Label Studio requests `/health` and `/setup` again."""
        return dict(self._transport.request("PATCH", f"/api/ml/{number}", body=fields))

    def delete_ml_backend(self, number: int) -> None:
        """Removes a connection; its webhook stays."""
        self._transport.request("DELETE", f"/api/ml/{number}")

    def webhooks(self, project: int) -> list[dict[str, Any]]:
        """Reads the webhooks of a project."""
        return list(self._transport.request("GET", "/api/webhooks/", params={"project": project}))

    def create_webhook(self, **fields: Any) -> None:
        """Creates a webhook."""
        self._transport.request("POST", "/api/webhooks/", body=fields)

    def update_webhook(self, number: int, **fields: Any) -> None:
        """Changes a webhook."""
        self._transport.request("PATCH", f"/api/webhooks/{number}/", body=fields)

    def delete_webhook(self, number: int) -> None:
        """Deletes a webhook."""
        self._transport.request("DELETE", f"/api/webhooks/{number}/")

    def _import(self, project: int, predictions: list[Mapping[str, Any]]) -> int:
        if not predictions:
            return 0
        try:
            self._transport.request(
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
        """Pages by id, since pages by number would skip tasks if others are deleted meanwhile."""
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
        answer = self._transport.request(
            "GET",
            "/api/tasks",
            params={"project": project, "page": 1, "query": json.dumps(query), **params},
        )
        if not isinstance(answer, dict):
            raise BadAnswer(f"{self.url}/api/tasks answers no page of tasks")
        return answer


def _unpredicted(version: str, after: int) -> list[dict[str, Any]]:
    """Filters of the tasks without an annotation that hold no prediction of a version."""
    return [
        _filter("total_annotations", "equal", "Number", 0),
        _filter("predictions_model_versions", "not_contains", "List", [version]),
        _filter("id", "greater", "Number", after),
    ]


def _filter(field: str, operator: str, kind: str, value: object) -> dict[str, Any]:
    return {"filter": f"filter:tasks:{field}", "operator": operator, "type": kind, "value": value}
