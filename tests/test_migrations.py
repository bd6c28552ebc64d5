"""Migrations of a database that an earlier release filled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import select, text
from sqlalchemy.orm import undefer

import ml_backend.store as store
from ml_backend.jobs.jobs import Jobs
from ml_backend.jobs.queue import Queue
from ml_backend.store.database import Database
from ml_backend.store.states import JobKind, JobState, VersionState
from ml_backend.store.tables import Job, ModelVersion
from ml_backend.wording import words

_MOMENT = "2026-01-01 00:00:00.000000"


@pytest.fixture
def migrated(database_url: str) -> Database:
    """A database of schema 0005 with a project, a version and a job of each kind, migrated."""
    database = Database(database_url)
    config = Config()
    config.set_main_option("script_location", str(Path(store.__path__[0]) / "migrations"))
    config.attributes["engine"] = database.engine
    command.upgrade(config, "0005")
    labelling = {"version": "v1", "cursor": 7, "done": 3, "imported": 2, "newest_task": 9}
    with database.engine.begin() as connection:
        connection.execute(
            text(
                "INSERT INTO projects (id, key, label_studio_id, title, label_config, revision, "
                "trained_revision, created_at) VALUES (1, '1.5', 1, 'old', '', 3, 0, :at)"
            ),
            {"at": _MOMENT},
        )
        connection.execute(
            text(
                "INSERT INTO model_versions (project_id, name, state, reason, card, created_at) "
                "VALUES (1, 'v1', 'rolled back', 'rolled back to v0 on request', '{}', :at)"
            ),
            {"at": _MOMENT},
        )
        for kind, state, payload in (
            ("train", "done", {}),
            ("autolabel", "queued", labelling),
            ("predict", "failed", {"tasks": [{"id": 4, "data": {}}], "done": 100}),
            ("tidy", "done", {"versions": ["v0"]}),
        ):
            connection.execute(
                text(
                    "INSERT INTO jobs (project_id, kind, state, reason, trigger, progress, "
                    "attempt, payload, created_at) VALUES (1, :kind, :state, :reason, 'command', "
                    "0, 1, :payload, :at)"
                ),
                {
                    "kind": kind,
                    "state": state,
                    "reason": f'it said "{kind}"',
                    "payload": json.dumps(payload),
                    "at": _MOMENT,
                },
            )
    database.migrate()
    return database


def _jobs(database: Database) -> dict[JobKind, Job]:
    with database.reading() as session:
        jobs = session.scalars(select(Job).options(undefer(Job.payload))).all()
    return {job.kind: job for job in jobs}


def test_migrate_reasons_in_words_become_reasons_with_the_same_words(migrated: Database) -> None:
    assert {words(job.reason) for job in _jobs(migrated).values()} == {
        f'it said "{kind}"' for kind in ("train", "autolabel", "predict", "tidy")
    }
    with migrated.reading() as session:
        (version,) = session.scalars(select(ModelVersion))
    assert version.state == VersionState.ROLLED_BACK
    assert words(version.reason) == "rolled back to v0 on request"


def test_migrate_jobs_keep_what_was_asked_for_and_how_far_they_were(migrated: Database) -> None:
    jobs = _jobs(migrated)
    expected: dict[JobKind, tuple[dict[str, Any], dict[str, Any]]] = {
        JobKind.TRAIN: ({}, {}),
        JobKind.AUTOLABEL: (
            {},
            {"version": "v1", "cursor": 7, "done": 3, "imported": 2, "newest_task": 9},
        ),
        JobKind.PREDICT: ({"tasks": [{"id": 4, "data": {}}]}, {}),
        JobKind.REMOVE_STALE: ({"versions": ["v0"]}, {}),
    }
    assert {kind: (job.payload, job.checkpoint) for kind, job in jobs.items()} == expected


def test_requeue_lost_job_that_an_earlier_release_queued_is_put_into_the_queue(
    migrated: Database,
) -> None:
    Jobs(migrated, Queue(migrated)).requeue_lost()
    job = _jobs(migrated)[JobKind.AUTOLABEL]
    assert (job.state, job.run) == (JobState.QUEUED, 1)
    table = "workflow_status" if migrated.is_sqlite else "dbos.workflow_status"
    with migrated.reading() as session:
        entries = session.execute(text(f"SELECT workflow_uuid, status FROM {table}")).all()
    assert [tuple(entry) for entry in entries] == [(f"job-{job.id}-run-1", "ENQUEUED")]
