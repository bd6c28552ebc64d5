"""The one place that puts the parts together."""

from __future__ import annotations

import functools
import tempfile
import threading
from typing import TYPE_CHECKING

from ml_backend.audits.audits import Audits
from ml_backend.jobs.jobs import Jobs
from ml_backend.label_studio.images import DiskCache
from ml_backend.projects.clients import LabelStudios
from ml_backend.projects.connection_title import InStep
from ml_backend.projects.ingest import Ingest
from ml_backend.serving.stale_predictions import Tidy
from ml_backend.settings import Settings, SettingsError
from ml_backend.store.artefacts import ArtefactStore
from ml_backend.store.database import Database, SchemaError
from ml_backend.store.open_artefacts import open_artefact_store
from ml_backend.training.promotion import Versions
from ml_backend.worker.worker import Tasks, Worker, make_queue

if TYPE_CHECKING:
    from ml_backend.serving.model_cache import ModelCache
    from ml_backend.serving.predictions import Serving


class Backend:
    """The parts of a running backend, each made when it is first needed.

    Server, worker, training process and command line are made of the same parts; torch, which
    takes seconds to import, is imported only by those that use it.

    Args:
        settings: what the admin set.

    Raises:
        SettingsError: `MODEL_DIR` cannot be used.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
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
        database = Database(self.settings.database)
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
    def label_studios(self) -> LabelStudios:
        """Clients and images by project."""
        cache = DiskCache(self.settings.model_dir / "images", self.settings.image_cache_bytes)
        return LabelStudios(self.settings, self.database, cache)

    @functools.cached_property
    def ingest(self) -> Ingest:
        """Stores what arrives."""
        return Ingest(self.database)

    @functools.cached_property
    def jobs(self) -> Jobs:
        """What was asked for."""
        return Jobs(self.database, self.settings)

    @functools.cached_property
    def versions(self) -> Versions:
        """Model versions, and which is live."""
        return Versions(self.database, self.artefacts)

    @functools.cached_property
    def tasks(self) -> Tasks:
        """The queue."""
        return Tasks(make_queue(self.settings))

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
    def in_step(self) -> InStep:
        """Keeps Label Studio's side in step."""
        return InStep(self.settings, self.database, self.label_studios)

    @functools.cached_property
    def audits(self) -> Audits:
        """What people made of predictions."""
        return Audits(self.settings, self.database, self.label_studios)

    def worker(self) -> Worker:
        """A worker on this backend's queue."""
        return Worker(
            self.settings,
            self.database,
            self.jobs,
            self.tasks,
            self.in_step,
            self.audits,
            self.label_studios,
            Tidy(self.database, self.label_studios, self.audits.update),
        )
