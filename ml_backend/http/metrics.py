"""`GET /metrics`: counters and gauges in Prometheus' text format.

A scrape reads running totals from the database; it goes through no annotations or audits.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from flask import Blueprint, Response
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    REGISTRY,
    CollectorRegistry,
    Metric,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.multiprocess import MultiProcessCollector
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from ml_backend.audits.audits import Audits
from ml_backend.http.request import backend
from ml_backend.projects.connectivity import Connectivity
from ml_backend.store.database import Database
from ml_backend.store.states import JobKind
from ml_backend.store.tables import UNTRAINED, Job, ModelVersion, Project, now

blueprint = Blueprint("metrics", __name__)


class _FromDatabase:
    """Reads jobs, live versions, audits and Label Studio's answers from the database.

    Processes that work on jobs have counters of their own, which end with them: their counts are
    those that the jobs keep.
    """

    def __init__(self, database: Database, audits: Audits, connectivity: Connectivity) -> None:
        self._database = database
        self._connectivity = connectivity
        self._audits = audits

    def collect(self) -> Iterator[Metric]:
        """Yields every family, read anew."""
        jobs = GaugeMetricFamily("ml_backend_jobs", "Jobs", labels=["kind", "state"])
        quality = GaugeMetricFamily(
            "ml_backend_live_ap50", "Mean AP50 of the live version", labels=["project", "version"]
        )
        pending = GaugeMetricFamily(
            "ml_backend_training_progress", "Progress of running trainings", labels=["project"]
        )
        with self._database.reading() as session:
            for kind, state, count in session.execute(
                select(Job.kind, Job.state, func.count()).group_by(Job.kind, Job.state)
            ):
                jobs.add_metric([kind, state], count)
            for key, version in session.execute(
                select(Project.key, ModelVersion)
                .join(ModelVersion, ModelVersion.project_id == Project.id)
                .where(ModelVersion.state == "live")
            ):
                quality.add_metric([key, version.name], version.card["metrics"]["map50"])
            for key, progress in session.execute(
                select(Project.key, Job.progress)
                .join(Job, Job.project_id == Project.id)
                .where(Job.kind == "train", Job.state == "running")
            ):
                pending.add_metric([key], progress)
            projects = session.execute(select(Project.id, Project.key)).all()
            predicted = list(_counted_by_jobs(session))
        yield from (jobs, quality, pending, *predicted)
        yield from self._answered()
        yield from self._audited([(number, key) for number, key in projects])

    def _answered(self) -> Iterator[Metric]:
        failing = GaugeMetricFamily(
            "ml_backend_label_studio_failing_seconds",
            "How long requests to Label Studio have failed; 0 while they do not",
            labels=["url", "failure"],
        )
        answered = GaugeMetricFamily(
            "ml_backend_label_studio_answered_timestamp_seconds",
            "When Label Studio last did what was asked, to half a minute",
            labels=["url"],
        )
        for contact in self._connectivity.all():
            since = contact.failing_since
            seconds = (now() - since).total_seconds() if since is not None else 0.0
            failing.add_metric([contact.url, contact.failure], seconds)
            if contact.answered_at is not None:
                answered.add_metric([contact.url], contact.answered_at.timestamp())
        yield from (failing, answered)

    def _audited(self, projects: Sequence[tuple[int, str]]) -> Iterator[Metric]:
        boxes = GaugeMetricFamily(
            "ml_backend_audited_boxes",
            "Predicted boxes by what people made of them, and boxes that they added",
            labels=["project", "version", "outcome"],
        )
        hours = GaugeMetricFamily(
            "ml_backend_hours_saved",
            "Hours that predictions saved, estimated",
            labels=["project", "version"],
        )
        seconds = GaugeMetricFamily(
            "ml_backend_lead_time_seconds",
            "Median time of an annotation, within 0.5 %: with boxes, of blind tasks, or before the "
            "first version",
            labels=["project", "version", "began"],
        )
        for number, key in projects:
            summary = self._audits.summary(number)
            if summary is None:
                continue
            for version, outcome in summary.versions.items():
                for name, count in asdict(outcome.boxes).items():
                    boxes.add_metric([key, version, name], count)
                if outcome.hours_saved is not None:
                    hours.add_metric([key, version], outcome.hours_saved)
                if outcome.pace is not None:
                    seconds.add_metric([key, version, "boxes"], outcome.pace.median)
            for began, pace in (("blind", summary.blind), ("early", summary.early)):
                if pace is not None:
                    seconds.add_metric([key, "", began], pace.median)
        yield from (boxes, hours, seconds)


def _counted_by_jobs(session: Session) -> Iterator[Metric]:
    """Sums what jobs that predict (`autolabel`, `predict`) have counted in their checkpoints."""
    imported = CounterMetricFamily(
        "ml_backend_job_predictions",
        "Predictions that jobs imported into Label Studio",
        labels=["project", "kind"],
    )
    failed = CounterMetricFamily(
        "ml_backend_job_image_failures",
        "Tasks that jobs left without a prediction, because an image could not be had",
        labels=["project", "kind"],
    )
    sums: dict[tuple[str, str], list[int]] = {}
    chosen: dict[tuple[str, str], list[int]] = {}
    for key, kind, version, *counts in session.execute(
        select(
            Project.key,
            Job.kind,
            Job.version,
            *(
                aggregate(func.coalesce(Job.checkpoint[name].as_integer(), 0))
                for name in ("imported", "left_out")
                for aggregate in (func.sum, func.max)
            ),
        )
        .join(Project, Project.id == Job.project_id)
        .where(Job.kind.in_((JobKind.AUTOLABEL, JobKind.AUTOLABEL_SHARD, JobKind.PREDICT)))
        .group_by(Project.key, Job.kind, Job.version)
    ):
        # Before the first version, each job goes on counting where the one before it ended.
        goes_on = kind == JobKind.AUTOLABEL and version in (None, UNTRAINED)
        total = sums.setdefault((key, kind), [0, 0])
        first = chosen.setdefault((key, kind), [0, 0])
        for place in (0, 1):
            summed, largest = counts[2 * place : 2 * place + 2]
            if goes_on:
                first[place] = max(first[place], largest)
            else:
                total[place] += summed
    for labels in sorted(sums):
        for family, place in ((imported, 0), (failed, 1)):
            family.add_metric(labels, sums[labels][place] + chosen[labels][place])
    yield from (imported, failed)


@blueprint.get("/metrics")
def metrics() -> Response:
    """Answers the counters of all processes of the server, and what the database holds."""
    shown = CollectorRegistry()
    shown.register(
        _FromDatabase(backend().database, backend().audits, backend().label_studios.connectivity)
    )
    text = generate_latest(shown)
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        counters = CollectorRegistry()
        MultiProcessCollector(counters)  # type: ignore[no-untyped-call]
        text += generate_latest(counters)
    else:
        text += generate_latest(REGISTRY)
    return Response(text, content_type=CONTENT_TYPE_LATEST)
