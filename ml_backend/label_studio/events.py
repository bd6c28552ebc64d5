"""Parses the bodies of Label Studio's webhooks and API (version 1.23) into typed values."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

_log = logging.getLogger(__name__)

Read = TypeVar("Read")


class InvalidEvent(ValueError):
    """A body is not of the form that Label Studio sends; the text names the field."""


@dataclass(frozen=True, slots=True)
class ProjectKey:
    """Identifies a project by its id and the time of its creation.

    Attributes:
        key: `"{id}.{creation as unix seconds}"`, as in requests to `/setup` and `/predict`.
        id: Label Studio's id.
    """

    key: str
    id: int


@dataclass(frozen=True, slots=True)
class ProjectInfo:
    """A project, as webhooks and the API show it.

    Attributes:
        updated_at: only webhooks tell.
        annotations: how many annotations it has, skipped ones left out, where Label Studio says so.
    """

    key: str
    id: int
    title: str
    label_config: str
    model_version: str | None
    updated_at: datetime | None = None
    annotations: int | None = None


@dataclass(frozen=True, slots=True)
class TaskInfo:
    """A task of a project."""

    id: int
    data: dict[str, Any]
    updated_at: datetime


@dataclass(frozen=True, slots=True)
class AnnotationInfo:
    """An annotation of a task. `lead_time` is the time that the person took, in seconds."""

    id: int
    task_id: int
    result: list[Any]
    was_cancelled: bool
    ground_truth: bool
    lead_time: float | None
    parent_prediction: int | None
    completed_by: int | None
    created_at: datetime
    updated_at: datetime


@dataclass(frozen=True, slots=True)
class PredictionInfo:
    """A prediction of any program. `model_version` is the name that this program gave."""

    id: int
    result: list[Any]
    model_version: str | None


@dataclass(frozen=True, slots=True)
class AnnotationsChanged:
    """Annotations were created or changed."""

    project: ProjectInfo
    annotations: tuple[AnnotationInfo, ...]
    tasks: tuple[TaskInfo, ...]


@dataclass(frozen=True, slots=True)
class AnnotationsDeleted:
    """Annotations were deleted."""

    project: ProjectInfo
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TasksChanged:
    """Tasks were created."""

    project: ProjectInfo
    tasks: tuple[TaskInfo, ...]


@dataclass(frozen=True, slots=True)
class TasksDeleted:
    """Tasks were deleted, and their annotations with them."""

    project: ProjectInfo
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ProjectChanged:
    """The project was changed: its label config, among others."""

    project: ProjectInfo


@dataclass(frozen=True, slots=True)
class TrainingRequested:
    """The Start Training button was pressed."""

    project: ProjectInfo


@dataclass(frozen=True, slots=True)
class Ignored:
    """An action that the backend does not need."""

    action: str


Event = (
    AnnotationsChanged
    | AnnotationsDeleted
    | TasksChanged
    | TasksDeleted
    | ProjectChanged
    | TrainingRequested
)


def parse_project_key(text: str) -> ProjectKey:
    """Parses `"{id}.{creation as unix seconds}"`, or an id alone.

    Raises:
        InvalidEvent: the text is neither.
    """
    found = re.fullmatch(r"([0-9]{1,18})(\.[0-9]{1,18})?", text)
    if found is None:
        raise InvalidEvent(
            f"project: {text[:40]!r} must be a project's number (1), or its key, which ends in "
            "Label Studio's time of its creation (1.1795463889)"
        )
    return ProjectKey(text, int(found[1]))


def parse_event(body: dict[str, Any]) -> Event | Ignored:
    """Parses the body of a webhook. Of several annotations or tasks, invalid ones are left out.

    Raises:
        InvalidEvent: a field is missing or wrong.
    """
    action = body.get("action")
    if not isinstance(action, str):
        raise InvalidEvent("action: missing")
    match action:
        case "ANNOTATION_CREATED" | "ANNOTATION_UPDATED" | "ANNOTATIONS_CREATED":
            return AnnotationsChanged(
                _project(body),
                _read_many(body, "annotation", read_annotation),
                _read_many(body, "task", read_task),
            )
        case "ANNOTATIONS_DELETED" | "ANNOTATION_DELETED":
            key = "annotations" if "annotations" in body else "annotation"
            return AnnotationsDeleted(_project(body), _ids(body, key))
        case "TASKS_CREATED":
            return TasksChanged(_project(body), _read_many(body, "tasks", read_task))
        case "TASKS_DELETED":
            return TasksDeleted(_project(body), _ids(body, "tasks"))
        case "PROJECT_UPDATED" | "PROJECT_CREATED":
            return ProjectChanged(_project(body))
        case "START_TRAINING":
            return TrainingRequested(_project(body))
        case _:
            return Ignored(action)


def read_project(content: object) -> ProjectInfo:
    """Parses a project from a webhook or the API.

    Raises:
        InvalidEvent: a field is missing or wrong.
    """
    fields = _fields(content, "project")
    number = _int(fields, "id", "project")
    created = _moment(fields, "created_at", "project")
    return ProjectInfo(
        key=f"{number}.{int(created.timestamp())}",
        id=number,
        title=str(fields.get("title") or ""),
        label_config=str(fields.get("label_config") or ""),
        model_version=_optional_text(fields.get("model_version")),
        updated_at=_moment(fields, "updated_at", "project") if "updated_at" in fields else None,
        annotations=_optional_id(fields.get("total_annotations_number")),
    )


def readable(read: Callable[[Any], Read], contents: Iterable[Any]) -> tuple[Read, ...]:
    """Parses several objects; those that are invalid are logged and left out."""
    found = []
    for content in contents:
        try:
            found.append(read(content))
        except InvalidEvent as error:
            number = content.get("id") if isinstance(content, dict) else None
            _log.warning("the object with the id %.40r is left out: %s", number, error)
    return tuple(found)


def read_task(content: object) -> TaskInfo:
    """Parses a task from a webhook or the API.

    Raises:
        InvalidEvent: a field is missing or wrong.
    """
    fields = _fields(content, "task")
    data = fields.get("data")
    if not isinstance(data, dict):
        raise InvalidEvent("task.data: must be an object")
    return TaskInfo(_int(fields, "id", "task"), data, _moment(fields, "updated_at", "task"))


def read_annotation(content: object) -> AnnotationInfo:
    """Parses an annotation from a webhook or the API.

    Raises:
        InvalidEvent: a field is missing or wrong.
    """
    fields = _fields(content, "annotation")
    result = fields.get("result")
    if not isinstance(result, list):
        raise InvalidEvent("annotation.result: must be a list")
    return AnnotationInfo(
        id=_int(fields, "id", "annotation"),
        task_id=_int(fields, "task", "annotation"),
        result=result,
        was_cancelled=bool(fields.get("was_cancelled")),
        ground_truth=bool(fields.get("ground_truth")),
        lead_time=_optional_seconds(fields.get("lead_time")),
        parent_prediction=_optional_id(fields.get("parent_prediction")),
        completed_by=_optional_id(fields.get("completed_by")),
        created_at=_moment(fields, "created_at", "annotation"),
        updated_at=_moment(fields, "updated_at", "annotation"),
    )


def read_prediction(content: object) -> PredictionInfo:
    """Parses a prediction from the API. A `result` that is not a list counts as an empty one.

    Raises:
        InvalidEvent: its id is missing or wrong.
    """
    fields = _fields(content, "prediction")
    result = fields.get("result")
    return PredictionInfo(
        _int(fields, "id", "prediction"),
        result if isinstance(result, list) else [],
        _optional_text(fields.get("model_version")),
    )


def _project(body: dict[str, Any]) -> ProjectInfo:
    return read_project(body.get("project"))


def _many(body: dict[str, Any], key: str) -> list[Any]:
    """Label Studio sends one object or a list of objects under the same key."""
    value = body.get(key)
    if isinstance(value, dict):
        return [value]
    if not isinstance(value, list):
        raise InvalidEvent(f"{key}: must be an object or a list")
    return value


def _read_many(body: dict[str, Any], key: str, read: Callable[[Any], Read]) -> tuple[Read, ...]:
    contents = _many(body, key)
    found = readable(read, contents)
    if contents and not found:
        # None is valid: this raises the error of the first one.
        read(contents[0])
    return found


def _ids(body: dict[str, Any], key: str) -> tuple[int, ...]:
    return tuple(_int(_fields(item, key), "id", key) for item in _many(body, key))


def _fields(content: object, what: str) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise InvalidEvent(f"{what}: must be an object")
    return content


def _int(fields: dict[str, Any], key: str, what: str) -> int:
    value = fields.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
        raise InvalidEvent(f"{what}.{key}: must be an id")
    return value


def _optional_id(value: object) -> int | None:
    if isinstance(value, dict):
        value = value.get("id")
    if not isinstance(value, int) or isinstance(value, bool):
        return None
    return value if 0 <= value < 2**63 else None


def _optional_text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _optional_seconds(value: object) -> float | None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    # The bounds also exclude nan, infinities and integers too large for a float.
    return float(value) if 0 <= value < 1e12 else None


def _moment(fields: dict[str, Any], key: str, what: str) -> datetime:
    value = fields.get(key)
    try:
        moment = datetime.fromisoformat(str(value))
        moment = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError):
        moment = datetime.min.replace(tzinfo=UTC)
    if moment.year < 1970:
        raise InvalidEvent(f"{what}.{key}: must be a time, 2026-01-31T12:00:00Z")
    return moment
