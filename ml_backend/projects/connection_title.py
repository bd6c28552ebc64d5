"""Keeps the title of a project's connection equal to the live version.

Label Studio chooses the next task by the score of predictions whose version equals the project's
`model_version`, and asks us for predictions only while that equals the title of our connection.
So the title follows the live version, and Label Studio moves `model_version` along by itself.
"""

from __future__ import annotations

import logging

from ml_backend.label_studio.errors import LabelStudioError, NotFound
from ml_backend.projects.clients import Clients
from ml_backend.projects.connect import connection_fields, has_credentials, own_connections
from ml_backend.settings import Settings
from ml_backend.store.database import Database
from ml_backend.store.tables import Project

_log = logging.getLogger(__name__)


class ConnectionTitle:
    """Moves the title of a project's connection to the live version."""

    def __init__(self, settings: Settings, database: Database, label_studios: Clients) -> None:
        self._settings = settings
        self._database = database
        self._label_studios = label_studios

    def update(self, project_id: int) -> bool:
        """Gives a project's connection the live version as its title.

        Args:
            project_id: the project's row.

        Returns:
            False where Label Studio failed and it must be tried again.
        """
        with self._database.reading() as session:
            project = session.get(Project, project_id)
        if project is None:
            return True
        client = self._label_studios.client(project)
        if client is None:
            _log.warning(
                "project %s: without LABEL_STUDIO_API_KEY the connection's title stays as it is, "
                "and Label Studio goes on choosing tasks at random",
                project.key,
            )
            return True
        version = project.version
        try:
            for backend in own_connections(client, project, self._settings, self._database):
                if backend["title"] == version:
                    continue
                if project.connection_url is None and not has_credentials(backend, self._settings):
                    _log.warning(
                        "project %s: the connection to %s keeps its title, because it lacks the "
                        "user of the basic authentication: `ml-backend connect` puts it right",
                        project.key,
                        backend["url"],
                    )
                    continue
                fields = connection_fields(
                    self._settings, project.label_studio_id, backend["url"], version
                )
                client.update_ml_backend(backend["id"], **fields)
                _log.info("project %s: the connection is titled %s now", project.key, version)
        except NotFound as error:
            # Most likely the connection was deleted; the next promotion looks again.
            _log.warning("project %s: the connection keeps its title: %s", project.key, error)
        except LabelStudioError as error:
            _log.warning(
                "project %s: the connection keeps its title for now: %s", project.key, error
            )
            return False
        return True
