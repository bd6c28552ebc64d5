"""The one place that puts the parts together."""

from __future__ import annotations

import functools
import tempfile
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from ml_backend.audits.audits import Audits
from ml_backend.audits.rollback import AuditedRollback
from ml_backend.jobs.jobs import Jobs
from ml_backend.jobs.live_heads import LiveHeadRequests
from ml_backend.jobs.queue import Queue
from ml_backend.jobs.reports import Reporter
from ml_backend.jobs.requests import Requests
from ml_backend.label_studio.disk_cache import DiskCache
from ml_backend.projects.clients import Clients
from ml_backend.projects.connection_title import ConnectionTitle
from ml_backend.projects.ingest import Ingest
from ml_backend.settings import Settings, SettingsError
from ml_backend.store.artefacts import ArtefactStore
from ml_backend.store.database import Database, SchemaError
from ml_backend.store.open_artefacts import open_artefact_store
from ml_backend.store.tables import Job
from ml_backend.training.promotion import Versions
from ml_backend.worker.housekeeping import Housekeeping
from ml_backend.worker.job_run import JobRun
from ml_backend.worker.preparation import Preparation
from ml_backend.worker.results import Results
from ml_backend.worker.worker import Worker

if TYPE_CHECKING:
    from ml_backend.serving.job_parts import PredictionParts
    from ml_backend.serving.model_cache import ModelCache
    from ml_backend.serving.predictions import Serving
    from ml_backend.worker.engine import QueueEngine


class Backend:
    """The parts of a running backend, each made when it is first needed.

    Server, worker, training process and command line are made of the same parts; torch and the
    queue's engine, which take long to import, are imported only by those that use them.

    Args:
        settings: what the admin set.
        report: hears of everything that would be stored, in a process that does a job: the process
            only reads the database.

    Raises:
        SettingsError: `MODEL_DIR` cannot be used.
    """

    def __init__(self, settings: Settings, report: Reporter | None = None) -> None:
        self.settings = settings
        self._report = report
        try:
            settings.model_dir.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=settings.model_dir):
                pass
        except OSError as error:
            raise SettingsError(
                f"MODEL_DIR: {settings.model_dir} must be a folder that this user can write to: "
                f"{error.strerror}"
            ) from error

    @functools.cached_property
    def database(self) -> Database:
        """The database, at this release's schema."""
        database = Database(self.settings.database, read_only=self._report is not None)
        if database.read_only:
            return database
        try:
            database.migrate()
        except SchemaError as error:
            name = "DATABASE_URL" if self.settings.database_url else "MODEL_DIR"
            raise SettingsError(f"{name}: the database cannot be used: {error}") from error
        except OSError as error:
            # Of the lock beside a SQLite file; MODEL_DIR was tried already.
            raise SettingsError(
                f"DATABASE_URL: no file can be written there: {error.strerror}"
            ) from error
        return database

    @functools.cached_property
    def artefacts(self) -> ArtefactStore:
        """The artefacts of model versions."""
        return open_artefact_store(self.settings)

    @functools.cached_property
    def label_studios(self) -> Clients:
        """Clients and images by project."""
        cache = DiskCache(self.settings.model_dir / "images", self.settings.image_cache_bytes)
        note = self._report.contact if self._report is not None else None
        return Clients(self.settings, self.database, cache, note)

    @functools.cached_property
    def ingest(self) -> Ingest:
        """Stores what arrives."""
        return Ingest(self.database)

    @functools.cached_property
    def queue(self) -> Queue:
        """The queue of jobs."""
        return Queue(self.database)

    @functools.cached_property
    def jobs(self) -> Jobs:
        """Jobs and their states."""
        return Jobs(self.database, self.queue)

    @functools.cached_property
    def requests(self) -> Requests:
        """Asks for jobs."""
        return Requests(self.database, self.queue, self.settings)

    @functools.cached_property
    def live_heads(self) -> LiveHeadRequests:
        """Asks for live heads."""
        return LiveHeadRequests(self.database, self.queue, self.settings)

    @functools.cached_property
    def versions(self) -> Versions:
        """Model versions, and which is live."""
        return Versions(self.database, self.artefacts)

    @functools.cached_property
    def models(self) -> ModelCache:
        """The cache of loaded detectors; follows promotions from the first use on."""
        from ml_backend.serving.model_cache import ModelCache

        models = ModelCache(self.settings, self.database, self.artefacts)
        threading.Thread(target=models.watch, name="models", daemon=True).start()
        return models

    @functools.cached_property
    def serving(self) -> Serving:
        """Predictions."""
        from ml_backend.serving.predictions import Serving

        return Serving(self.settings, self.models, self.label_studios)

    @functools.cached_property
    def connection_title(self) -> ConnectionTitle:
        """Shows the live version in the title of the connection."""
        return ConnectionTitle(self.settings, self.database, self.label_studios)

    @functools.cached_property
    def audits(self) -> Audits:
        """What people made of predictions."""
        return Audits(self.settings, self.database, self.label_studios)

    def prediction_parts(self, report: Reporter) -> PredictionParts:
        """What a job that predicts works with."""
        from ml_backend.serving.job_parts import PredictionParts

        return PredictionParts(
            self.settings,
            self.database,
            self.label_studios,
            lambda: self.serving,
            lambda project: self.models.version(project),
            report,
        )

    @functools.cached_property
    def preparation(self) -> Preparation:
        """Does what a job needs to have stored before its process starts."""
        return Preparation(self.database, self.jobs, self.ingest, self.label_studios, self.audits)

    def job_run(self, job: Job, stopping: threading.Event) -> JobRun:
        """Stores what the process of a claimed job reports."""
        results = Results(
            self.settings,
            self.database,
            self.jobs,
            self.requests,
            self.queue,
            self.versions,
            self.artefacts,
        )
        return JobRun(job, self.database, self.jobs, results, self.label_studios, stopping)

    def worker(self) -> Worker:
        """A worker on this backend's queue."""
        from ml_backend.worker.engine import QueueEngine

        return Worker(
            self.settings,
            self.jobs,
            self.label_studios,
            self.preparation,
            engine=lambda name, run: QueueEngine(self.database, name, run),
            housekeeping=self._housekeeping,
            job_run=self.job_run,
        )

    def _housekeeping(self, running: Callable[[], set[int]], engine: QueueEngine) -> Housekeeping:
        return Housekeeping(
            self.settings,
            self.database,
            self.jobs,
            self.requests,
            self.live_heads,
            self.ingest,
            self.label_studios,
            self.connection_title,
            self.audits,
            AuditedRollback(self.database, self.versions),
            running=running,
            forget=engine.forget,
            prune=engine.prune,
        )
