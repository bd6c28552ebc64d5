"""Test that running totals of audits equal a recount, whatever happens to the annotations."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import event, select

from ml_backend.audits.totals import Basis, Totals, read_totals, sum_audits
from ml_backend.backend import Backend
from ml_backend.http.app import create_app
from ml_backend.label_studio.events import Ignored, parse_event
from ml_backend.reasons import Code, reason
from ml_backend.settings import load_settings
from ml_backend.store.tables import Annotation, Audit, Job, Project
from ml_backend.training.promotion import Verdict
from tests.conftest import capture, record_version

KEY = "1.1795463889"
START = datetime(2026, 11, 23, 20, 0, tzinfo=UTC)
CARD: dict[str, Any] = {
    "data": {"tasks": 5, "boxes": {}},
    "metrics": {"map50": 0.5, "map50_interval": {"low": 0.4, "high": 0.6}},
}


def _backend(folder: Path, **values: str) -> Backend:
    return Backend(
        load_settings(
            {
                "MODEL_DIR": str(folder),
                "ML_BACKEND_DEVICE": "cpu",
                "ML_BACKEND_WEIGHTS": "none",
                "ML_BACKEND_PRESET": "tiny",
                **values,
            }
        )
    )


def _hear(backend: Backend, body: dict[str, Any]) -> int:
    heard = parse_event(body)
    assert not isinstance(heard, Ignored)
    return backend.ingest.apply(heard, heard.project).project_id


def _annotated(number: int, minute: int, **fields: Any) -> dict[str, Any]:
    body = copy.deepcopy(capture("POST_webhook_ANNOTATION_CREATED"))
    moment = (START + timedelta(minutes=minute)).isoformat()
    body["annotation"] |= {"id": number, "task": number, "updated_at": moment, **fields}
    body["task"] |= {"id": number, "updated_at": moment}
    return body


def _deleted(number: int) -> dict[str, Any]:
    body = capture("POST_webhook_ANNOTATIONS_DELETED")
    return body | {"annotations": [{"id": number}]}


def _began_with(backend: Backend, number: int, version: str, *, blind: bool = False) -> None:
    """Enters that an annotation began with a version's prediction of six boxes, counted before."""
    with backend.database.session() as session:
        annotation = session.scalars(
            select(Annotation).where(Annotation.label_studio_id == number)
        ).one()
        if session.get(Audit, annotation.id) is None:
            session.add(
                Audit(
                    annotation_id=annotation.id,
                    project_id=annotation.project_id,
                    revision=-1,
                    version=version,
                    blind=blind,
                    accepted=0 if blind else 6,
                    standing=False,
                )
            )


def _make_version(backend: Backend, project: int, name: str) -> None:
    """Enters a version, which is live if it is the first."""
    verdict = Verdict(promote=True, reason=reason(Code.FIRST_VERSION, ap50=0.5))
    record_version(
        backend.versions,
        backend.database,
        project,
        name,
        CARD,
        verdict,
        parent=None,
        revision=0,
    )


def _check_totals(backend: Backend, project: int) -> None:
    with backend.database.reading() as session:
        basis = Basis.of(session, project, backend.settings)
        assert session.get_one(Project, project).audit_basis == basis.as_text()
        assert read_totals(session, project, basis) == sum_audits(session, project, basis)
        for annotation, audit in session.execute(
            select(Annotation, Audit).join(Audit, Audit.annotation_id == Annotation.id)
        ):
            assert audit.standing == (not annotation.was_cancelled and not annotation.deleted_at)
            assert not audit.standing or audit.lead_time == annotation.lead_time
            assert audit.revision == annotation.revision


_CHANGES = st.lists(
    st.tuples(
        st.integers(1, 6),
        st.sampled_from(["annotate", "skip", "delete", "count", "version"]),
        st.one_of(st.none(), st.floats(0, 500)),
        st.sampled_from(["v1", "v2", "theirs", "blind", "nothing"]),
    ),
    min_size=1,
    max_size=25,
)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(changes=_CHANGES)
def test_totals_after_any_changes_equal_a_recount(
    changes: list[tuple[int, str, float | None, str]],
) -> None:
    with TemporaryDirectory() as folder:
        backend = _backend(Path(folder))
        project = _hear(backend, _annotated(99, 0))
        for minute, (number, change, lead_time, version) in enumerate(changes, 1):
            if change == "delete":
                _hear(backend, _deleted(number))
            elif change == "count":
                assert backend.audits.update(project) is None
                _check_totals(backend, project)
            elif change == "version":
                _make_version(backend, project, f"w{minute}")
            else:
                body = _annotated(
                    number, minute, lead_time=lead_time, was_cancelled=change == "skip"
                )
                _hear(backend, body)
                if version != "nothing":
                    name = "v1" if version == "blind" else version
                    _began_with(backend, number, name, blind=version == "blind")
        assert backend.audits.update(project) is None
        _check_totals(backend, project)
        backend.database.close()


@pytest.fixture
def backend(tmp_path: Path) -> Iterator[Backend]:
    """Makes a backend with a version and two annotations that began with its prediction."""
    backend = _backend(tmp_path)
    project = _hear(backend, _annotated(1, 0, lead_time=10.0))
    _hear(backend, _annotated(2, 0, lead_time=30.0))
    _make_version(backend, project, "v1")
    for number in (1, 2):
        _began_with(backend, number, "v1")
    assert backend.audits.update(project) is None
    yield backend
    backend.database.close()


def test_totals_of_other_stated_costs_are_summed_anew(backend: Backend, tmp_path: Path) -> None:
    dearer = _backend(tmp_path, ML_BACKEND_COST_DRAW="27.6")
    (before, after) = (one.audits.summary(1) for one in (backend, dearer))
    assert before is not None
    assert after is not None
    assert (before.ours.hours_saved or 0.0) < (after.ours.hours_saved or 0.0)
    assert dearer.audits.update(1) is None
    _check_totals(dearer, 1)
    assert dearer.audits.summary(1) == after


def test_metrics_scrape_reads_totals_and_no_audits(backend: Backend) -> None:
    client = create_app(backend).test_client()
    asked: list[str] = []
    event.listen(
        backend.database.engine,
        "before_cursor_execute",
        lambda _, __, statement, *rest: asked.append(statement),
    )
    text = client.get("/metrics").text
    assert 'ml_backend_audited_boxes{outcome="deleted"' in text
    assert asked
    for statement in asked:
        assert "FROM audits" not in statement
        assert "FROM annotations" not in statement


def test_metrics_count_what_processes_of_jobs_predicted(backend: Backend) -> None:
    client = create_app(backend).test_client()
    with backend.database.session() as session:
        for kind, state, version, imported, left_out in (
            # Before the first version each job goes on counting where the one before ended.
            ("autolabel", "done", "untrained", 60, 0),
            ("autolabel", "done", "untrained", 100, 0),
            ("autolabel", "done", "v1", 500, 3),
            ("autolabel", "running", "v2", 70, 1),
            ("autolabel_shard", "done", "v2", 40, 1),
            ("predict", "done", "v1", 20, 2),
            ("predict", "queued", None, 0, 0),
        ):
            session.add(
                Job(
                    project_id=1,
                    kind=kind,
                    state=state,
                    version=version,
                    trigger="command",
                    checkpoint={"imported": imported, "left_out": left_out},
                )
            )
    text = client.get("/metrics").text
    for kind, imported, failures in (
        ("autolabel", 670, 4),
        ("autolabel_shard", 40, 1),
        ("predict", 20, 2),
    ):
        labels = f'{{kind="{kind}",project="{KEY}"}}'
        assert f"ml_backend_job_predictions_total{labels} {imported}.0" in text
        assert f"ml_backend_job_image_failures_total{labels} {failures}.0" in text
    assert 'ml_backend_jobs{kind="predict",state="queued"} 1.0' in text


def test_totals_median_of_times_is_that_of_all_annotations() -> None:
    totals = Totals()
    for time, count in (("10", 1), ("8.6", 2), ("30", 1)):
        totals.add(Totals(timed=count))
        totals.times[time] += count
    assert totals.median == pytest.approx(9.3)
