"""Webhooks: recorded bodies are understood, damaged ones refused with the field's name."""

from __future__ import annotations

import copy
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ml_backend.label_studio.events import (
    AnnotationsChanged,
    AnnotationsDeleted,
    Event,
    Ignored,
    InvalidEvent,
    ProjectChanged,
    ProjectKey,
    TasksChanged,
    TasksDeleted,
    TrainingRequested,
    parse_event,
    parse_project_key,
    read_annotation,
    read_project,
    read_task,
)
from tests.conftest import CAPTURES, capture

WEBHOOKS = sorted(path.stem for path in CAPTURES.glob("POST_webhook_*.json"))
ACTIONS = [
    "ANNOTATION_CREATED",
    "ANNOTATION_UPDATED",
    "ANNOTATIONS_CREATED",
    "ANNOTATIONS_DELETED",
    "ANNOTATION_DELETED",
    "TASKS_CREATED",
    "TASKS_DELETED",
    "PROJECT_UPDATED",
    "PROJECT_CREATED",
    "START_TRAINING",
]


def _webhook(action: str) -> dict[str, Any]:
    return capture(f"POST_webhook_{action}")


def _parse(action: str) -> Event:
    event = parse_event(_webhook(action))
    assert not isinstance(event, Ignored)
    return event


@pytest.mark.parametrize("name", WEBHOOKS)
def test_parse_event_recorded_webhooks_have_the_project_key_of_setup_and_predict(
    name: str,
) -> None:
    event = parse_event(capture(name))
    assert not isinstance(event, Ignored)
    assert event.project.id == 1
    assert event.project.key == capture("POST_setup")["project"]
    assert event.project.key == capture("POST_predict")["project"]
    assert event.project.title == "bccd"
    assert event.project.label_config.startswith("<View><Image")
    assert event.project.model_version == "det"


def test_parse_event_annotation_created_holds_annotation_and_task() -> None:
    event = _parse("ANNOTATION_CREATED")
    assert isinstance(event, AnnotationsChanged)
    (annotation,) = event.annotations
    assert (annotation.id, annotation.task_id) == (1, 1)
    assert [region["id"] for region in annotation.result] == ["r1"]
    assert annotation.lead_time == 3.2
    assert annotation.completed_by == 1
    assert annotation.parent_prediction is None
    assert not annotation.was_cancelled
    assert not annotation.ground_truth
    assert annotation.created_at == datetime(2026, 11, 23, 19, 58, 11, 83224, tzinfo=UTC)
    (task,) = event.tasks
    assert task.id == 1
    assert task.data["image"].startswith("/data/upload/1/")


def test_parse_event_annotation_updated_without_regions_has_an_empty_result() -> None:
    event = _parse("ANNOTATION_UPDATED")
    assert isinstance(event, AnnotationsChanged)
    (annotation,) = event.annotations
    assert (annotation.id, annotation.task_id, annotation.result) == (1, 1, [])
    assert annotation.updated_at > annotation.created_at
    assert [task.id for task in event.tasks] == [1]


def test_parse_event_annotations_created_in_bulk_are_all_read() -> None:
    body = _webhook("ANNOTATIONS_CREATED")
    event = parse_event(body)
    assert isinstance(event, AnnotationsChanged)
    assert len(event.annotations) > 1
    assert [a.id for a in event.annotations] == [a["id"] for a in body["annotation"]]
    assert [a.task_id for a in event.annotations] == [a["task"] for a in body["annotation"]]
    assert [a.parent_prediction for a in event.annotations] == [
        a["parent_prediction"] for a in body["annotation"]
    ]
    assert [t.id for t in event.tasks] == [t["id"] for t in body["task"]]
    assert {a.task_id for a in event.annotations} == {t.id for t in event.tasks}
    assert all(a.lead_time is None for a in event.annotations)


def test_parse_event_annotations_deleted_gives_their_ids() -> None:
    event = _parse("ANNOTATIONS_DELETED")
    assert isinstance(event, AnnotationsDeleted)
    assert event.ids == (1,)


def test_parse_event_single_annotation_deleted_gives_its_id() -> None:
    body = _webhook("ANNOTATIONS_DELETED")
    del body["annotations"]
    event = parse_event({**body, "action": "ANNOTATION_DELETED", "annotation": {"id": 7}})
    assert isinstance(event, AnnotationsDeleted)
    assert event.ids == (7,)


def test_parse_event_tasks_deleted_gives_their_ids() -> None:
    event = _parse("TASKS_DELETED")
    assert isinstance(event, TasksDeleted)
    assert event.ids == (6,)


def test_parse_event_tasks_created_holds_their_data() -> None:
    task = capture("POST_predict")["tasks"][0]
    project = _webhook("PROJECT_UPDATED")["project"]
    event = parse_event({"action": "TASKS_CREATED", "tasks": [task], "project": project})
    assert isinstance(event, TasksChanged)
    assert [(t.id, t.data) for t in event.tasks] == [(task["id"], task["data"])]


def test_parse_event_project_updated_holds_the_new_label_config() -> None:
    event = _parse("PROJECT_UPDATED")
    assert isinstance(event, ProjectChanged)
    assert 'value="New"' in event.project.label_config


def test_parse_event_start_training_gives_training_requested() -> None:
    assert isinstance(_parse("START_TRAINING"), TrainingRequested)


@pytest.mark.parametrize("action", ["LABEL_LINK_CREATED", "PROJECT_DELETED", "", "start_training"])
def test_parse_event_other_action_is_ignored_with_any_body(action: str) -> None:
    assert parse_event({"action": action}) == Ignored(action)
    assert parse_event({"action": action, "project": 5, "annotation": None}) == Ignored(action)


@pytest.mark.parametrize("action", [None, 5, ["START_TRAINING"], {"a": 1}])
def test_parse_event_missing_action_is_an_error(action: object) -> None:
    with pytest.raises(InvalidEvent, match="action"):
        parse_event({"action": action})
    with pytest.raises(InvalidEvent, match="action"):
        parse_event({})


GONE = object()
# In UTC this would be in the year 10000.
LATEST = "9999-12-31T23:59:59-23:59"


@pytest.mark.parametrize(
    ("action", "path", "value", "named"),
    [
        *((action, ["project"], GONE, "project") for action in ACTIONS),
        ("START_TRAINING", ["project"], 1, "project"),
        ("START_TRAINING", ["project", "id"], GONE, "project.id"),
        ("START_TRAINING", ["project", "id"], "1", "project.id"),
        ("START_TRAINING", ["project", "id"], True, "project.id"),
        ("START_TRAINING", ["project", "id"], -1, "project.id"),
        ("START_TRAINING", ["project", "id"], 2**63, "project.id"),
        ("START_TRAINING", ["project", "id"], 1.5, "project.id"),
        ("START_TRAINING", ["project", "created_at"], GONE, "project.created_at"),
        ("START_TRAINING", ["project", "created_at"], "yesterday", "project.created_at"),
        ("START_TRAINING", ["project", "created_at"], "1969-12-31T23:59:59Z", "project.created_at"),
        ("START_TRAINING", ["project", "created_at"], LATEST, "project.created_at"),
        ("ANNOTATION_CREATED", ["annotation"], GONE, "annotation"),
        ("ANNOTATION_CREATED", ["annotation"], 5, "annotation"),
        ("ANNOTATION_CREATED", ["annotation"], [5], "annotation"),
        ("ANNOTATION_CREATED", ["task"], GONE, "task"),
        ("ANNOTATION_CREATED", ["annotation", "id"], None, "annotation.id"),
        ("ANNOTATION_CREATED", ["annotation", "task"], "1", "annotation.task"),
        ("ANNOTATION_CREATED", ["annotation", "result"], GONE, "annotation.result"),
        ("ANNOTATION_CREATED", ["annotation", "result"], {}, "annotation.result"),
        ("ANNOTATION_CREATED", ["annotation", "created_at"], 5, "annotation.created_at"),
        ("ANNOTATION_UPDATED", ["annotation", "updated_at"], "", "annotation.updated_at"),
        ("ANNOTATION_UPDATED", ["task", "id"], GONE, "task.id"),
        ("ANNOTATION_UPDATED", ["task", "data"], ["a.png"], "task.data"),
        ("ANNOTATION_UPDATED", ["task", "updated_at"], None, "task.updated_at"),
        ("ANNOTATIONS_CREATED", ["annotation"], [{}, {}], "annotation.result"),
        ("ANNOTATIONS_CREATED", ["task"], [5], "task"),
        ("ANNOTATIONS_DELETED", ["annotations"], None, "annotations"),
        ("ANNOTATIONS_DELETED", ["annotations"], [1], "annotations"),
        ("ANNOTATIONS_DELETED", ["annotations", 0, "id"], "1", "annotations.id"),
        ("TASKS_DELETED", ["tasks"], GONE, "tasks"),
        ("TASKS_DELETED", ["tasks", 0, "id"], None, "tasks.id"),
    ],
)
def test_parse_event_damaged_body_error_names_the_field(
    action: str, path: list[str | int], value: object, named: str
) -> None:
    recorded = f"POST_webhook_{action}"
    body = capture(recorded) if recorded in WEBHOOKS else {**_webhook("START_TRAINING")}
    body["action"] = action
    _replace(body, path, value)
    with pytest.raises(InvalidEvent) as caught:
        parse_event(body)
    assert str(caught.value).startswith(f"{named}:")


def test_parse_event_invalid_one_of_several_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    body = _webhook("ANNOTATIONS_CREATED")
    first, second, third = (a["id"] for a in body["annotation"])
    body["annotation"][1]["result"] = None
    del body["task"][0]["data"]
    event = parse_event(body)
    assert isinstance(event, AnnotationsChanged)
    assert [a.id for a in event.annotations] == [first, third]
    assert [t.id for t in event.tasks] == [t["id"] for t in body["task"][1:]]
    assert f"the id {second} is left out: annotation.result: must be a list" in caplog.text
    for annotation in body["annotation"]:
        annotation["result"] = None
    with pytest.raises(InvalidEvent, match=r"annotation\.result"):
        parse_event(body)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("lead_time", 4, 4.0),
        ("lead_time", None, None),
        ("lead_time", "3.2", None),
        ("lead_time", True, None),
        ("lead_time", -1, None),
        ("lead_time", float("nan"), None),
        ("lead_time", float("inf"), None),
        pytest.param("lead_time", 10**400, None, id="lead_time-enormous"),
        ("parent_prediction", 12, 12),
        ("parent_prediction", "12", None),
        ("completed_by", 3, 3),
        # The API answers the whole user where it is asked for all fields.
        ("completed_by", {"id": 3, "email": "someone@example.com"}, 3),
        ("completed_by", True, None),
        ("completed_by", -3, None),
        ("completed_by", 2**63, None),
        ("was_cancelled", True, True),
        ("was_cancelled", None, False),
        ("ground_truth", True, True),
    ],
)
def test_read_annotation_optional_fields_are_read_or_none(
    field: str, value: object, expected: object
) -> None:
    content = {**_webhook("ANNOTATION_CREATED")["annotation"], field: value}
    found = getattr(read_annotation(content), field)
    assert found == expected
    assert type(found) is type(expected)


def test_read_project_model_version_is_a_text_or_none() -> None:
    project = _webhook("START_TRAINING")["project"]
    assert read_project({**project, "model_version": "new"}).model_version == "new"
    assert read_project({**project, "model_version": None}).model_version is None
    assert read_project({**project, "model_version": {"a": 1}}).model_version is None


def test_read_task_time_without_a_zone_is_utc() -> None:
    task = capture("POST_predict")["tasks"][0]
    noon = datetime(2026, 1, 31, 12, tzinfo=UTC)
    assert read_task({**task, "updated_at": "2026-01-31T12:00:00Z"}).updated_at == noon
    assert read_task({**task, "updated_at": "2026-01-31T14:00:00+02:00"}).updated_at == noon
    assert read_task({**task, "updated_at": "2026-01-31T12:00:00"}).updated_at == noon


def test_read_project_key_does_not_depend_on_the_time_zone() -> None:
    project = _webhook("START_TRAINING")["project"]
    moment = datetime.fromisoformat(project["created_at"])
    elsewhere = moment.astimezone(timezone(timedelta(hours=-9, minutes=-30))).isoformat()
    assert elsewhere != project["created_at"]
    assert read_project({**project, "created_at": elsewhere}).key == read_project(project).key


@pytest.mark.parametrize(
    ("text", "number"), [("1.1795463889", 1), ("42", 42), ("123456789.0", 123456789)]
)
def test_parse_project_key_gives_the_id(text: str, number: int) -> None:
    assert parse_project_key(text) == ProjectKey(text, number)


@pytest.mark.parametrize(
    "text", ["", "x", "1.", ".1", "-1", "1.2.3", " 1", "1\n", "1e3", "../1", "٣.٤", "9" * 19]
)
def test_parse_project_key_invalid_text_is_an_error(text: str) -> None:
    with pytest.raises(InvalidEvent, match="project"):
        parse_project_key(text)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.just(10**400)
    | st.floats()
    | st.text(max_size=8)
    | st.datetimes().map(lambda moment: moment.isoformat())
    | st.sampled_from(["0001-01-01T00:00:00+23:59", LATEST, "2026"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["id", "task", "data", "result", "created_at", "updated_at"])
            | st.text(max_size=4),
            inner,
            max_size=5,
        )
    ),
    max_leaves=12,
)


@given(
    body=st.dictionaries(st.text(max_size=10), JSON, max_size=6)
    | st.fixed_dictionaries(
        {"action": st.sampled_from(ACTIONS)},
        optional=dict.fromkeys(
            ("project", "annotation", "annotations", "task", "tasks", "x"), JSON
        ),
    )
)
@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
def test_parse_event_any_json_is_parsed_or_an_error(body: dict[str, Any]) -> None:
    _understood_or_refused(body)


@given(name=st.sampled_from(WEBHOOKS), data=st.data())
@settings(
    max_examples=500,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
def test_parse_event_recorded_body_with_any_change_is_parsed_or_an_error(
    name: str, data: st.DataObject
) -> None:
    body = capture(name)
    read = ("action", "project", "annotation", "annotations", "task", "tasks")
    places = [place for place in _places(body) if place[0] in read]
    _replace(body, data.draw(st.sampled_from(places)), data.draw(JSON | st.just(GONE)))
    _understood_or_refused(body)


def _understood_or_refused(body: dict[str, Any]) -> None:
    before = copy.deepcopy(body)
    try:
        event = parse_event(body)
    except InvalidEvent as error:
        assert ":" in str(error)
        return
    assert repr(body) == repr(before)
    if isinstance(event, Ignored):
        assert event.action == body["action"]
        assert event.action not in ACTIONS
        return
    assert parse_project_key(event.project.key).id == event.project.id
    version = event.project.model_version
    assert version is None or isinstance(version, str)
    if isinstance(event, AnnotationsChanged):
        for annotation in event.annotations:
            assert annotation.created_at.tzinfo is not None
            assert annotation.updated_at.tzinfo is not None
            assert annotation.lead_time is None or 0 <= annotation.lead_time < float("inf")
            assert isinstance(annotation.result, list)
    if isinstance(event, AnnotationsDeleted | TasksDeleted):
        assert all(0 <= number < 2**63 for number in event.ids)


def _places(content: Any, above: tuple[str | int, ...] = ()) -> list[list[str | int]]:
    """Where something stands in a JSON value, three levels deep."""
    if len(above) == 3 or not isinstance(content, dict | list):
        return []
    inner = content.items() if isinstance(content, dict) else enumerate(content)
    found: list[list[str | int]] = []
    for key, value in inner:
        found += [[*above, key], *_places(value, (*above, key))]
    return found


def _replace(content: Any, path: list[str | int], value: object) -> None:
    *above, last = path
    for key in above:
        content = content[key]
    if value is GONE:
        del content[last]
    else:
        content[last] = value
