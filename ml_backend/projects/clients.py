"""Makes clients of the Label Studio that holds a project.

Address and token come from the settings, or from `/setup`, which carries the address that is
configured in Label Studio and the legacy token of the project's owner. The settings win where their
Label Studio holds the project; each token is sent only to the address that it came with.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable

from sqlalchemy import update

from ml_backend.label_studio.client import LabelStudioClient
from ml_backend.label_studio.disk_cache import DiskCache
from ml_backend.label_studio.errors import LabelStudioError, NotFound
from ml_backend.label_studio.images import ImageSource
from ml_backend.projects.connectivity import Connectivity
from ml_backend.settings import Settings
from ml_backend.store.database import Database
from ml_backend.store.tables import Project

_log = logging.getLogger(__name__)


class Clients:
    """Makes clients and image sources, and keeps them by project.

    Args:
        settings: address and token of the Label Studio that an admin named.
        database: remembers which projects are there.
        cache: disk cache of images, shared by all sources.
        note: receives address, kind of failure and detail of what a Label Studio answered, where
            this process does not write to the database itself.

    Attributes:
        connectivity: how each Label Studio answers.
    """

    def __init__(
        self,
        settings: Settings,
        database: Database,
        cache: DiskCache,
        note: Callable[[str, str, str], None] | None = None,
    ) -> None:
        self._settings = settings
        self._database = database
        self._cache = cache
        self.connectivity = Connectivity(database, note)
        self._lock = threading.Lock()
        self._clients: dict[tuple[str, str], LabelStudioClient] = {}
        self._sources: dict[tuple[str | None, str | None, str | None], ImageSource] = {}

    def default(self) -> LabelStudioClient | None:
        """Makes the client of the settings' Label Studio; None without address and token."""
        token = self._settings.label_studio_api_key
        if self._settings.label_studio_url is None or token is None:
            return None
        return self._client(self._settings.label_studio_url, token.get_secret_value())

    def client(self, project: Project) -> LabelStudioClient | None:
        """Makes the client of a project's Label Studio; None where no token for it is known."""
        if self._is_default(project):
            return self.default()
        if project.url and project.token:
            return self._client(project.url, project.token)
        return None

    def wait(self, project: Project) -> float:
        """Computes the seconds until a project's Label Studio, which fails, is asked again."""
        client = self.client(project)
        return self.connectivity.wait(client.url if client else project.url or "")

    def wait_for(self, project_id: int) -> float:
        """Computes the seconds until the failing Label Studio of a project is asked again."""
        with self._database.reading() as session:
            return self.wait(session.get_one(Project, project_id))

    def images(self, project: Project) -> ImageSource:
        """Makes the reader of the images of a project's tasks."""
        client = self.client(project)
        url = client.url if client else self._settings.label_studio_url or project.url
        key = (url, client.token if client else None, project.url)
        with self._lock:
            if key not in self._sources:
                self._sources[key] = ImageSource(
                    url,
                    client,
                    self._cache,
                    max_bytes=self._settings.image_max_bytes,
                    timeout=self._settings.image_timeout,
                    other_urls=[project.url] if project.url else [],
                    allowed_hosts=self._settings.allowed_image_hosts,
                )
            return self._sources[key]

    def _client(self, url: str, token: str) -> LabelStudioClient:
        with self._lock:
            if (url, token) not in self._clients:
                self._clients[url, token] = LabelStudioClient(
                    url, token, functools.partial(self.connectivity.note, url)
                )
            return self._clients[url, token]

    def _is_default(self, project: Project) -> bool:
        client = self.default()
        if client is None:
            return False
        if project.is_default is not None:
            return project.is_default
        try:
            found = client.project(project.label_studio_id).key == project.key
        except NotFound:
            found = False
        except LabelStudioError as error:
            # The answer is unknown and is not stored: the next call asks again.
            _log.warning("whether %s holds project %s: %s", client.url, project.key, error)
            return project.url is None or project.url == client.url
        project.is_default = found
        if self._database.read_only:
            return found
        with self._database.session() as session:
            session.execute(
                update(Project).where(Project.id == project.id).values(is_default=found)
            )
        return found
