"""Test the storing of events that arrive twice, late, out of order, all at once, or at a kill."""

from __future__ import annotations

import copy
import math
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from ml_backend.label_studio.events import (
    AnnotationInfo,
    Ignored,
    TaskInfo,
    parse_event,
    read_annotation,
    read_project,
    read_task,
)
from ml_backend.projects.counts import annotated_tasks, changes_since, live_annotations
from ml_backend.projects.find import ProjectNotFound, find_project
from ml_backend.projects.ingest import Applied, Ingest
from ml_backend.store.database import Database
from ml_backend.store.tables import Annotation, Project, Task, now
from tests.conftest import CAPTURES, capture

START = datetime(2026, 11, 23, 20, 0, tzinfo=UTC)
KEY = "1.1795463889"


class Store:
    """Holds a database of its own, filled by webhooks' bodies."""

    def __init__(self, url: str) -> None:
        self.database = Database(url)
        self.database.migrate()
        self.ingest = Ingest(self.database)

    def hear(self, body: dict[str, Any]) -> Applied:
        """Applies a webhook's body."""
        event = parse_event(body)
        assert not isinstance(event, Ignored)
        return self.ingest.apply(event, event.project)

    def project(self) -> Project:
        """The one project."""
        with self.database.reading() as session:
            return session.scalars(select(Project)).one()

    def annotation(self, number: int) -> Annotation:
        """One annotation, whether it is deleted or not."""
        with self.database.reading() as session:
            return session.scalars(
                select(Annotation).where(Annotation.label_studio_id == number)
            ).one()

    def task(self, number: int) -> Task:
        """One task, whether it is deleted or not."""
        with self.database.reading() as session:
            return session.scalars(select(Task).where(Task.label_studio_id == number)).one()

    def annotated(self) -> int:
        """Tasks with an annotation to learn from."""
        with self.database.reading() as session:
            return annotated_tasks(session, self.project().id)

    def live(self) -> int:
        """Annotations that are neither skipped nor deleted."""
        with self.database.reading() as session:
            return live_annotations(session, self.project().id)

    def changes(self, since: int = 0) -> int:
        """Annotations that changed after a revision."""
        with self.database.reading() as session:
            return changes_since(session, self.project().id, since)


@pytest.fixture
def store(database_url: str) -> Iterator[Store]:
    """Makes an empty store."""
    store = Store(database_url)
    yield store
    store.database.close()


def _created(
    number: int, *, minute: int = 0, task: int | None = None, width: float = 10, **fields: object
) -> dict[str, Any]:
    """Makes an ANNOTATION_CREATED as recorded, of another annotation, in the state of a minute."""
    body = copy.deepcopy(capture("POST_webhook_ANNOTATION_CREATED"))
    moment = (START + timedelta(minutes=minute)).isoformat()
    task = number if task is None else task
    body["annotation"] |= {"id": number, "task": task, "updated_at": moment, **fields}
    if body["annotation"]["result"]:
        body["annotation"]["result"][0]["value"]["width"] = width
    body["task"] |= {"id": task, "updated_at": moment}
    return body


def _updated(
    number: int, *, minute: int, width: float = 10, was_cancelled: bool = False
) -> dict[str, Any]:
    body = _created(number, minute=minute, width=width, was_cancelled=was_cancelled)
    return body | {"action": "ANNOTATION_UPDATED"}


def _deleted(*numbers: int) -> dict[str, Any]:
    body = capture("POST_webhook_ANNOTATIONS_DELETED")
    return body | {"annotations": [{"id": number} for number in numbers]}


def _tasks_deleted(*numbers: int) -> dict[str, Any]:
    body = capture("POST_webhook_TASKS_DELETED")
    return body | {"tasks": [{"id": number} for number in numbers]}


def _width(annotation: Annotation) -> float:
    width: float = annotation.result[0]["value"]["width"]
    return width


def _shown(*bodies: dict[str, Any]) -> tuple[list[TaskInfo], list[AnnotationInfo]]:
    """Makes tasks and annotations as the API would show them."""
    return (
        [read_task(body["task"]) for body in bodies],
        [read_annotation(body["annotation"]) for body in bodies],
    )


def test_apply_recorded_webhooks_in_order_store_what_label_studio_holds(store: Store) -> None:
    for name in (
        "ANNOTATION_CREATED",
        "ANNOTATION_UPDATED",
        "ANNOTATIONS_CREATED",
        "PROJECT_UPDATED",
        "START_TRAINING",
        "ANNOTATIONS_DELETED",
        "TASKS_DELETED",
    ):
        store.hear(capture(f"POST_webhook_{name}"))
    assert store.annotated() == 3
    assert store.live() == 3
    project = store.project()
    assert (project.key, project.label_studio_id, project.title) == (KEY, 1, "bccd")
    assert 'value="New"' in project.label_config
    assert store.annotation(1).deleted_at is not None
    assert store.annotation(3).parent_prediction == 3


def test_apply_same_event_twice_counts_once(store: Store) -> None:
    assert store.hear(_created(1)).changed == 1
    first = store.project()
    assert store.hear(_created(1)).changed == 0
    again = store.project()
    assert (again.revision, again.changed_at) == (first.revision, first.changed_at)
    assert (store.annotated(), store.changes()) == (1, 1)


def test_apply_late_creation_does_not_undo_an_update(store: Store) -> None:
    store.hear(_updated(1, minute=2, width=33))
    assert store.hear(_created(1, minute=0, width=10)).changed == 0
    assert _width(store.annotation(1)) == 33


def test_apply_old_update_does_not_undo_a_newer_one(store: Store) -> None:
    store.hear(_created(1, minute=0))
    store.hear(_updated(1, minute=5, width=55))
    assert store.hear(_updated(1, minute=3, width=33)).changed == 0
    assert _width(store.annotation(1)) == 55
    assert store.hear(_updated(1, minute=7, width=77)).changed == 1
    assert _width(store.annotation(1)) == 77


def test_apply_old_task_data_do_not_undo_newer_ones(store: Store) -> None:
    newer = _created(1, task=9, minute=5)
    newer["task"]["data"] = {"image": "/data/new.jpg"}
    store.hear(newer)
    store.hear(_created(2, task=9, minute=1))
    assert store.task(9).data == {"image": "/data/new.jpg"}
    assert store.annotated() == 1


def test_apply_update_after_the_deletion_revives_nothing(store: Store) -> None:
    store.hear(_created(1))
    assert store.hear(_deleted(1)).changed == 1
    assert store.hear(_updated(1, minute=9)).changed == 0
    assert store.annotation(1).deleted_at is not None
    assert store.annotated() == 0


def test_apply_deletion_before_the_creation_holds(store: Store) -> None:
    assert store.hear(_deleted(1)).changed == 0
    assert store.hear(_created(1)).changed == 0
    assert (store.annotated(), store.live(), store.changes()) == (0, 0, 0)
    assert store.project().revision == 0


def test_apply_deletion_twice_counts_as_one_change(store: Store) -> None:
    store.hear(_created(1))
    store.hear(_created(2))
    seen = store.project().revision
    assert store.hear(_deleted(1)).changed == 1
    assert store.hear(_deleted(1)).changed == 0
    assert store.changes(seen) == 1
    assert store.annotated() == 1


def test_apply_annotations_created_in_bulk_are_all_stored(store: Store) -> None:
    body = capture("POST_webhook_ANNOTATIONS_CREATED")
    assert store.hear(body).changed == 3
    assert store.annotated() == 3
    assert store.project().revision == 1
    assert store.task(4).data == body["task"][1]["data"]


def test_apply_more_annotations_than_a_statement_holds_are_all_stored(store: Store) -> None:
    body = capture("POST_webhook_ANNOTATIONS_CREATED")
    bodies = [_created(number) for number in range(1, 1202)]
    body["annotation"] = [b["annotation"] for b in bodies]
    body["task"] = [b["task"] for b in bodies]
    assert store.hear(body).changed == 1201
    assert store.annotated() == 1201
    assert store.hear(_tasks_deleted(*range(1, 1202))).changed == 1201
    assert store.annotated() == 0


def test_apply_annotation_twice_in_one_event_is_stored_in_its_later_state(store: Store) -> None:
    body = capture("POST_webhook_ANNOTATIONS_CREATED")
    bodies = [_created(1, minute=5, width=55), _created(1, minute=1, width=11)]
    body["annotation"] = [b["annotation"] for b in bodies]
    body["task"] = [b["task"] for b in bodies]
    assert store.hear(body).changed == 1
    assert _width(store.annotation(1)) == 55


def test_apply_skipped_annotation_is_kept_and_not_learned_from(store: Store) -> None:
    store.hear(_created(1, was_cancelled=True))
    store.hear(_created(2))
    assert store.annotation(1).was_cancelled
    assert (store.annotated(), store.live(), store.changes()) == (1, 1, 1)
    store.hear(_updated(1, minute=3, was_cancelled=False))
    assert (store.annotated(), store.live()) == (2, 2)


def test_annotated_tasks_several_annotations_of_a_task_count_once(store: Store) -> None:
    store.hear(_created(1, task=5))
    store.hear(_created(2, task=5))
    assert (store.annotated(), store.live()) == (1, 2)


def test_annotated_tasks_empty_annotation_counts(store: Store) -> None:
    store.hear(_created(1, result=[]))
    assert store.annotated() == 1


def test_apply_deleted_tasks_delete_their_annotations(store: Store) -> None:
    for number in (1, 2, 3):
        store.hear(_created(number))
    assert store.hear(_tasks_deleted(1, 3)).changed == 2
    assert store.annotated() == 1
    assert store.annotation(1).deleted_at is not None
    assert store.annotation(2).deleted_at is None
    assert store.hear(_tasks_deleted(1, 3)).changed == 0


def test_apply_late_event_does_not_revive_a_deleted_task(store: Store) -> None:
    store.hear(_tasks_deleted(1))
    store.hear(_created(1, minute=9))
    assert store.annotated() == 0
    assert store.task(1).deleted_at is not None


def test_read_back_annotation_no_longer_shown_is_deleted(store: Store) -> None:
    for number in (1, 2):
        store.hear(_created(number, task=5))
    project = store.project()
    changed = store.ingest.read_back(
        project.id, *_shown(_created(2, task=5)), asked_at=now() + timedelta(seconds=1)
    )
    assert changed == 1
    assert store.annotation(1).deleted_at is not None
    assert store.annotation(2).deleted_at is None
    assert store.project().revision == project.revision + 1


def test_read_back_annotation_that_arrived_after_the_request_stays(store: Store) -> None:
    store.hear(_created(2, task=5))
    asked_at = now()
    store.hear(_created(1, task=5))
    assert (
        store.ingest.read_back(store.project().id, *_shown(_created(2, task=5)), asked_at=asked_at)
        == 0
    )
    assert store.annotation(1).deleted_at is None


def test_read_back_missed_annotation_is_stored_and_known_ones_are_not_counted_again(
    store: Store,
) -> None:
    store.hear(_created(1, width=11))
    shown = _shown(_created(1, width=11), _created(2), _updated(3, minute=4, width=44))
    number = store.project().id
    assert store.ingest.read_back(number, *shown, asked_at=now()) == 2
    assert store.ingest.read_back(number, *shown, asked_at=now()) == 0
    assert store.annotated() == 3
    assert store.project().revision == 2


def test_read_back_clock_was_ahead_stores_the_state_that_the_api_shows(store: Store) -> None:
    store.hear(_created(1, minute=400_000, width=11))
    store.hear(_updated(1, minute=5, width=22))
    assert _width(store.annotation(1)) == 11
    shown = _shown(_updated(1, minute=5, width=22))
    assert store.ingest.read_back(store.project().id, *shown, asked_at=now()) == 1
    assert _width(store.annotation(1)) == 22
    # What arrived after the API was asked stands.
    asked_at = now()
    store.hear(_updated(1, minute=6, width=33))
    assert store.ingest.read_back(store.project().id, *shown, asked_at=asked_at) == 0
    assert _width(store.annotation(1)) == 33


def test_read_back_deleted_meanwhile_is_not_revived(store: Store) -> None:
    store.hear(_created(1))
    shown = _shown(_created(1))
    asked_at = now()
    store.hear(_deleted(1))
    store.ingest.read_back(store.project().id, *shown, asked_at=asked_at)
    assert store.annotated() == 0


def test_read_back_annotations_of_other_tasks_stay(store: Store) -> None:
    store.hear(_created(1))
    store.hear(_created(2))
    later = now() + timedelta(seconds=1)
    assert store.ingest.read_back(store.project().id, *_shown(_created(1)), asked_at=later) == 0
    assert store.annotated() == 2


def test_remove_tasks_deletes_them_and_their_annotations(store: Store) -> None:
    for number in (1, 2):
        store.hear(_created(number))
    project = store.project()
    assert store.ingest.remove_tasks(project.id, {1}) == 1
    assert store.annotation(1).deleted_at is not None
    assert store.task(1).deleted_at is not None
    assert store.annotated() == 1
    assert store.ingest.remove_tasks(project.id, {1}) == 0


def test_read_back_shown_again_after_a_deletion_is_restored(store: Store) -> None:
    for number in (1, 2, 3):
        store.hear(_created(number, width=11))
    store.hear(_tasks_deleted(1))
    store.hear(_deleted(2))
    seen = store.project().revision
    # 4 was heard of by its deletion alone.
    store.hear(_tasks_deleted(4))
    shown = _shown(*(_created(number, width=11) for number in (1, 2, 3, 4)))
    assert store.ingest.read_back(store.project().id, *shown, asked_at=now()) == 3
    assert store.annotated() == 4
    assert store.changes(seen) == 3
    assert store.task(4).data == shown[0][3].data
    assert _width(store.annotation(1)) == 11
    store.hear(_updated(1, minute=3, width=33))
    assert _width(store.annotation(1)) == 33


def test_read_back_deletion_after_the_request_wins(store: Store) -> None:
    for number in (1, 2):
        store.hear(_created(number))
    shown = _shown(_created(1, minute=5), _created(2, minute=5))
    asked_at = now()
    store.hear(_tasks_deleted(1))
    store.hear(_deleted(2))
    assert store.ingest.read_back(store.project().id, *shown, asked_at=asked_at) == 0
    assert store.task(1).deleted_at is not None
    assert store.annotated() == 0


def test_read_back_unreadable_annotation_stays_as_it_is_stored(store: Store) -> None:
    store.hear(_created(1, task=5))
    tasks, _ = _shown(_created(1, task=5))
    later = now() + timedelta(seconds=1)
    number = store.project().id
    assert store.ingest.read_back(number, tasks, [], asked_at=later, unreadable={1}) == 0
    assert store.annotated() == 1


def test_introduce_same_id_of_two_label_studios_makes_two_projects(store: Store) -> None:
    other = _created(1, width=77)
    other["project"]["created_at"] = "2020-01-01T00:00:00Z"
    mine, theirs = store.hear(_created(1)), store.hear(other)
    assert mine.project_id != theirs.project_id
    with store.database.reading() as session:
        assert annotated_tasks(session, mine.project_id) == 1
        assert annotated_tasks(session, theirs.project_id) == 1
    other |= {"action": "TASKS_DELETED", "tasks": [{"id": 1}]}
    store.hear(other)
    with store.database.reading() as session:
        assert annotated_tasks(session, mine.project_id) == 1
        assert annotated_tasks(session, theirs.project_id) == 0


def _started(annotations: int) -> dict[str, Any]:
    """Makes a START_TRAINING of a project that has so many annotations in Label Studio."""
    body = copy.deepcopy(capture("POST_webhook_START_TRAINING"))
    body["project"]["total_annotations_number"] = annotations
    return body


def test_apply_reported_annotations_are_missing_here_marks_the_project_until_read_back(
    store: Store,
) -> None:
    store.hear(_started(24))
    asked_at = now()
    marked = store.project().unread_since
    assert marked is not None
    assert marked <= asked_at
    store.ingest.end_reading(
        store.project().id, read_project(_started(24)["project"]), asked_at=asked_at
    )
    assert store.project().unread_since is None


def test_apply_reported_annotations_are_all_known_marks_nothing(store: Store) -> None:
    body = _created(1)
    body["project"]["total_annotations_number"] = 1
    store.hear(body)
    store.hear(_started(1))
    assert store.project().unread_since is None


def test_apply_first_webhook_of_a_project_annotated_before_marks_it(store: Store) -> None:
    body = _created(25)
    body["project"]["total_annotations_number"] = 25
    store.hear(body)
    assert store.project().unread_since is not None


def test_end_reading_marked_after_it_began_stays_marked(store: Store) -> None:
    asked_at = now()
    store.hear(_started(24))
    store.ingest.end_reading(
        store.project().id, read_project(_started(24)["project"]), asked_at=asked_at
    )
    assert store.project().unread_since is not None


def test_introduce_id_alone_means_the_one_known_project(store: Store) -> None:
    store.hear(_created(1))
    row = store.ingest.introduce("1", 1, label_config="<View/>")
    assert row.key == KEY
    assert store.project().label_config == "<View/>"
    assert find_project(store.database, "1").id == row.id


def test_introduce_full_key_after_id_alone_completes_the_same_row(store: Store) -> None:
    first = store.ingest.introduce("1", 1, label_config="<View/>")
    assert first.key == "1"
    assert store.ingest.introduce("1", 1, label_config="<View/>").id == first.id
    assert store.hear(_created(1)).project_id == first.id
    assert store.project().key == KEY
    assert find_project(store.database, "1").id == find_project(store.database, KEY).id == first.id


def test_introduce_id_alone_of_several_label_studios_is_refused_with_their_keys(
    store: Store,
) -> None:
    other = "1.1577836800"
    for key in (KEY, other):
        store.ingest.introduce(key, 1, label_config="<View/>")
    with pytest.raises(ProjectNotFound, match=f"{KEY}, {other}"):
        store.ingest.introduce("1", 1, label_config="<View/>")


def test_introduce_id_and_full_key_at_once_makes_one_row(store: Store) -> None:
    with ThreadPoolExecutor(8) as pool:
        rows = pool.map(
            lambda key: store.ingest.introduce(key, 1, label_config="<View/>").id, ["1", KEY] * 16
        )
    assert set(rows) == {store.project().id}
    assert store.project().key == KEY


def test_introduce_again_updates_address_and_token_and_keeps_the_rest(store: Store) -> None:
    store.hear(_created(1))
    config = store.project().label_config
    first = store.ingest.introduce(KEY, 1, label_config=config, url="http://a", token="t1")
    store.ingest.introduce(KEY, 1, label_config="<View/>")
    project = store.project()
    assert (project.id, project.url, project.token) == (first.id, "http://a", "t1")
    assert project.label_config == "<View/>"
    assert project.title == "bccd"
    store.ingest.introduce(KEY, 1, label_config=config, url="http://b", token="t2")
    project = store.project()
    assert (project.url, project.token, project.label_config) == ("http://b", "t2", config)
    assert store.annotated() == 1
    # A token goes to the address that it came with, and to no other.
    store.ingest.introduce(KEY, 1, label_config=config, url="http://c")
    assert (store.project().url, store.project().token) == ("http://c", None)


def _configured(label: str, *, minute: int) -> dict[str, Any]:
    """Makes a PROJECT_UPDATED as recorded, with another label config, in the state of a minute."""
    body = capture("POST_webhook_PROJECT_UPDATED")
    body["project"] |= {
        "title": f"with {label}",
        "label_config": f"<View>{label}</View>",
        "updated_at": (START + timedelta(minutes=minute)).isoformat(),
    }
    return body


def test_apply_late_event_does_not_set_the_label_config_back(store: Store) -> None:
    # Without any other word, an annotation's event tells it.
    store.hear(_created(1))
    assert store.project().label_config == capture("POST_setup")["schema"]
    store.hear(_configured("newer", minute=5))
    store.hear(_configured("older", minute=3))
    late = _created(2)
    late["project"] |= _configured("stale", minute=9)["project"]
    store.hear(late)
    project = store.project()
    assert (project.label_config, project.title) == ("<View>newer</View>", "with newer")
    store.hear(_configured("newest", minute=7))
    assert store.project().label_config == "<View>newest</View>"
    # A task was opened since.
    store.ingest.introduce(KEY, 1, label_config="<View>opened</View>")
    store.hear(_configured("late", minute=8))
    project = store.project()
    assert (project.label_config, project.title) == ("<View>opened</View>", "with newest")


def test_end_reading_title_and_config_are_replaced_by_newer_ones(store: Store) -> None:
    store.hear(_created(1))
    asked_at = now()
    body = _configured("newer", minute=0)
    body["project"]["updated_at"] = (asked_at + timedelta(seconds=5)).isoformat()
    shown = read_project(_configured("shown", minute=0)["project"])
    number = store.project().id
    store.ingest.end_reading(number, shown, asked_at=asked_at)
    project = store.project()
    assert (project.label_config, project.reconciled_at) == ("<View>shown</View>", asked_at)
    store.hear(body)
    store.ingest.end_reading(number, shown, asked_at=asked_at)
    assert store.project().label_config == "<View>newer</View>"


def test_apply_failure_halfway_stores_nothing(store: Store) -> None:
    store.hear(_created(1))
    body = _created(2)
    body["annotation"]["result"] = [object()]
    with pytest.raises(Exception, match="not JSON serializable"):
        store.hear(body)
    assert store.annotated() == 1
    with store.database.reading() as session:
        assert session.scalars(select(Task.label_studio_id)).all() == [1]


def test_apply_text_that_a_database_cannot_hold_loses_no_event(store: Store) -> None:
    body = _created(1, width=math.nan)
    body["annotation"]["result"][0]["meta"] = {"text": ["a\0b"], "far": [math.inf]}
    body["project"]["title"] = "cells\0"
    body["annotation"]["updated_at"] = "9999-12-31T23:59:59Z"
    assert store.hear(body).changed == 1
    stored = store.annotation(1)
    assert stored.result[0]["value"]["width"] is None
    assert stored.result[0]["meta"] == {"text": ["a\0b"], "far": [None]}
    assert stored.updated_at == datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)
    assert store.project().title == "cells"


def test_apply_two_hundred_events_from_sixteen_threads_lose_nothing(store: Store) -> None:
    with ThreadPoolExecutor(16) as pool:
        applied = list(pool.map(lambda number: store.hear(_created(number)), range(1, 201)))
    assert [a.changed for a in applied] == [1] * 200
    assert len({a.project_id for a in applied}) == 1
    assert (store.annotated(), store.live(), store.changes()) == (200, 200, 200)
    # Each event raised the revision by one of its own.
    assert store.project().revision == 200
    with store.database.reading() as session:
        assert sorted(session.scalars(select(Annotation.revision))) == list(range(1, 201))


def test_apply_states_of_one_annotation_from_many_threads_end_with_the_latest(store: Store) -> None:
    minutes = [(7 * i) % 40 for i in range(40)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda m: store.hear(_updated(1, minute=m, width=10 + m)), minutes))
    assert _width(store.annotation(1)) == 10 + 39
    assert store.annotated() == 1


def test_migrate_several_threads_at_once_is_safe(database_url: str) -> None:
    database = Database(database_url)
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(database.migrate) for _ in range(4)]:
            done.result()
    with database.reading() as session:
        assert session.scalars(select(Project)).all() == []
    database.close()


def test_migrate_new_file_cannot_be_read_by_others(
    tmp_path: Path,
) -> None:
    Database(f"sqlite:///{tmp_path / 'deep/er/test.db'}").migrate()
    assert (tmp_path / "deep/er/test.db").stat().st_mode & 0o077 == 0


_TALKATIVE = """
import logging, sys
logging.basicConfig(level=logging.INFO)
from ml_backend.store.database import Database

Database(sys.argv[1]).migrate()
"""


def test_checkpoint_writes_stored_rows_into_the_file(tmp_path: Path) -> None:
    file = tmp_path / "test.db"
    store = Store(f"sqlite:///{file}")
    store.database.checkpoint()

    def in_the_file_alone() -> int:
        copy = tmp_path / "copy.db"
        shutil.copy(file, copy)
        with closing(sqlite3.connect(copy)) as connection:
            (found,) = connection.execute("SELECT count(*) FROM annotations").fetchone()
            return int(found)

    store.hear(_created(1))
    assert in_the_file_alone() == 0
    store.database.checkpoint()
    assert in_the_file_alone() == 1
    store.database.close()


def test_migrate_several_processes_at_once_print_nothing(database_url: str) -> None:
    # The first makes the database, the others wait for it, or find it.
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _TALKATIVE, database_url],
            stderr=subprocess.PIPE,
            text=True,
            cwd=CAPTURES.parents[1],
        )
        for _ in range(3)
    ]
    assert [(p.communicate()[1], p.returncode) for p in processes] == [("", 0)] * 3


_KILLED = """
import json, os, signal, sys
from pathlib import Path
from ml_backend.label_studio.events import parse_event
from ml_backend.projects.ingest import Ingest
from ml_backend.store.database import Database

database = Database(sys.argv[1])
event = parse_event(json.loads(Path(sys.argv[2]).read_text())["body"])
Ingest(database).apply(event, event.project)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_apply_process_killed_right_after_it_keeps_the_event(
    store: Store, database_url: str
) -> None:
    file = CAPTURES / "POST_webhook_ANNOTATION_CREATED.json"
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, database_url, str(file)],
        capture_output=True,
        text=True,
        cwd=CAPTURES.parents[1],
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert store.annotated() == 1
    assert store.hear(capture("POST_webhook_ANNOTATION_CREATED")).changed == 0
