"""`GET /metrics`: Prometheus' text format; what the database knows is read when asked."""

from __future__ import annotations

import os
from collections.abc import Iterator

from flask import Blueprint, Response
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    REGISTRY,
    CollectorRegistry,
    Metric,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.multiprocess import MultiProcessCollector
from sqlalchemy import func, select

from ml_backend.http.current import backend
from ml_backend.store.database import Database
from ml_backend.store.tables import Job, ModelVersion, Project

blueprint = Blueprint("metrics", __name__)


class _FromDatabase:
    """Jobs and live versions, as the database has them at the moment."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def collect(self) -> Iterator[Metric]:
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
        yield from (jobs, quality, pending)


@blueprint.get("/metrics")
def metrics() -> Response:
    """Counters of all worker processes, and gauges from the database."""
    shown = CollectorRegistry()
    shown.register(_FromDatabase(backend().database))
    text = generate_latest(shown)
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        counters = CollectorRegistry()
        MultiProcessCollector(counters)  # type: ignore[no-untyped-call]
        text += generate_latest(counters)
    else:
        text += generate_latest(REGISTRY)
    return Response(text, content_type=CONTENT_TYPE_LATEST)
