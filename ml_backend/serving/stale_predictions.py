"""Removes predictions that newer ones have replaced: those of this backend, and nobody else's.

One request for each. Label Studio can remove all predictions of a version in one request, but does
so in one transaction, during which nobody can save an annotation (5 to 8 ms for each prediction),
and then forgets the project's `model_version`, which ends pre-annotation and the order of tasks.
"""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from ml_backend.jobs.outcomes import Done
from ml_backend.jobs.payloads import AutolabelCheckpoint, StalePayload
from ml_backend.jobs.reports import Reporter
from ml_backend.label_studio.client import LabelStudioClient
from ml_backend.label_studio.errors import NotFound
from ml_backend.projects.clients import Clients
from ml_backend.reasons import Code, reason
from ml_backend.store.database import Database
from ml_backend.store.states import JobKind
from ml_backend.store.tables import PRETRAINED, UNTRAINED, Job, ModelVersion, Project

_CHECKPOINT_EVERY = 20


class StalePredictions:
    """Removes predictions of versions that are no longer live, and the second of the live one.

    Args:
        database: which version is live; it is only read.
        label_studios: where the predictions are.
        report: hears how far the job is.
    """

    def __init__(self, database: Database, label_studios: Clients, report: Reporter) -> None:
        self._database = database
        self._label_studios = label_studios
        self._report = report

    def run(self, job: Job) -> Done:
        """Does a claimed job; a job that is tried again goes on where it stopped.

        Annotations that began with a prediction that is removed stay as they are.

        Raises:
            TakenOver: another run has the job.
            LabelStudioError: Label Studio could not do what was asked.
        """
        with self._database.reading() as session:
            project = session.get_one(Project, job.project_id)
        client = self._label_studios.client(project)
        if client is None:
            return Done(reason(Code.STALE_KEPT))
        number = project.label_studio_id
        held = client.prediction_counts(number)
        versions = StalePayload.model_validate(job.payload).versions
        # One of them may be live again by now.
        older = [v for v in versions if held.get(v) and v != self._live(project.id)]
        total = sum(held[v] for v in older)
        removed = 0
        for version in older:
            for page in client.predictions(number, version):
                if self._live(project.id) == version:
                    break
                for prediction in page:
                    removed += _delete(client, prediction["id"])
                    if removed % _CHECKPOINT_EVERY == 0:
                        self._report.check()
                        why = reason(Code.REMOVING_STALE, removed=removed, total=total)
                        self._report.checkpoint(min(1.0, removed / total), why, {})
        doubled = self._remove_doubled(client, number, self._live(project.id))
        return Done(reason(Code.STALE_REMOVED, removed=removed, versions=older, doubled=doubled))

    def _remove_doubled(self, client: LabelStudioClient, project: int, version: str) -> int:
        """Removes the second prediction of a task that was opened during an import."""
        removed = 0
        kept: set[int] = set()
        for page in client.predictions(project, version, doubled=True):
            for prediction in sorted(page, key=lambda p: int(p["id"])):
                if prediction["task"] in kept:
                    removed += _delete(client, prediction["id"])
                kept.add(prediction["task"])
        return removed

    def _live(self, project_id: int) -> str:
        with self._database.reading() as session:
            return session.get_one(Project, project_id).version


def older_versions(session: Session, project_id: int, live: str) -> list[str]:
    """Lists the versions, other than the live one, with which this backend has predicted."""
    names = [
        PRETRAINED,
        *session.scalars(
            select(ModelVersion.name)
            .where(ModelVersion.project_id == project_id)
            .order_by(ModelVersion.id)
        ),
    ]
    # Others may call theirs the same: it is ours only where we imported some.
    before_any = session.scalars(
        select(Job).where(
            Job.project_id == project_id,
            Job.kind == JobKind.AUTOLABEL,
            Job.version == UNTRAINED,
        )
    )
    if any(AutolabelCheckpoint.model_validate(job.checkpoint).imported for job in before_any):
        names.append(UNTRAINED)
    return [name for name in names if name != live]


def _delete(client: LabelStudioClient, number: int) -> int:
    """Deletes a prediction; returns 1, or 0 where it was gone already."""
    try:
        client.delete_prediction(number)
    except NotFound:
        # Its task was deleted meanwhile.
        return 0
    return 1
