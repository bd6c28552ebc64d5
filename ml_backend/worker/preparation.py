"""Prepares a job before its process starts: the process only reads the database."""

from __future__ import annotations

import logging

from ml_backend.audits.audits import Audits
from ml_backend.jobs.jobs import Jobs
from ml_backend.jobs.outcomes import RetryLater
from ml_backend.label_studio.errors import LabelStudioError, Passing
from ml_backend.projects.clients import Clients
from ml_backend.projects.ingest import Ingest
from ml_backend.projects.reconcile import reconcile
from ml_backend.reasons import Code, reason
from ml_backend.store.database import Database
from ml_backend.store.states import JobKind
from ml_backend.store.tables import Job, Project

_log = logging.getLogger(__name__)


class Preparation:
    """Prepares jobs by their kind.

    Args:
        database: the store.
        jobs: hears how far a job is.
        ingest: stores what is read back.
        label_studios: clients by project.
        audits: counts how people changed predictions.
    """

    def __init__(
        self,
        database: Database,
        jobs: Jobs,
        ingest: Ingest,
        label_studios: Clients,
        audits: Audits,
    ) -> None:
        self._database = database
        self._jobs = jobs
        self._ingest = ingest
        self._label_studios = label_studios
        self._audits = audits

    def prepare(self, job: Job) -> dict[str, object]:
        """Prepares a claimed job; answers the values that its process must know, as JSON.

        Raises:
            RetryLater: something else must be done first.
            TakenOver: another run has the job.
        """
        with self._database.reading() as session:
            project = session.get_one(Project, job.project_id)
        # Asked here whether the project is in the Label Studio of the settings, since the answer
        # is stored.
        self._label_studios.client(project)
        if job.kind == JobKind.TRAIN:
            return self._read_back(job, project)
        if job.kind == JobKind.REMOVE_STALE:
            self._settle(job, project)
        return {}

    def _read_back(self, job: Job, project: Project) -> dict[str, object]:
        """Reads back the project's annotations; answers why Label Studio fails, if it does."""
        client = self._label_studios.client(project)
        if client is None:
            _log.warning("project %s: no token, nothing is read back", project.key)
            return {}
        self._jobs.progress(job, 0.0, reason(Code.READING_BACK))
        try:
            reconcile(project, client, self._database, self._ingest)
        except LabelStudioError as error:
            # The annotations that came by webhooks are enough; the next training reads back again.
            _log.warning("project %s is trained on what webhooks told: %s", project.key, error)
            if isinstance(error, Passing):
                return {"label_studio_fails": str(error)}
        return {}

    def _settle(self, job: Job, project: Project) -> None:
        """Audits annotations before the predictions that they began with are removed."""
        if self._label_studios.client(project) is None:
            return
        while (wait := self._audits.update(project.id)) is not None:
            if wait:
                raise RetryLater(reason(Code.AUDITS_FIRST), wait)
            self._jobs.beat(job)
