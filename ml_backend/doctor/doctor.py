"""Runs all checks in their order, and yields their findings."""

from __future__ import annotations

from collections.abc import Iterator

from ml_backend.doctor.finding import Check, Examined, Finding
from ml_backend.doctor.label_studio import failing, reached
from ml_backend.doctor.machine import artefacts, device, disk, live_versions, weights
from ml_backend.doctor.project import project
from ml_backend.doctor.server import server
from ml_backend.projects.clients import Clients
from ml_backend.settings import Settings
from ml_backend.store.artefacts import ArtefactStore
from ml_backend.store.database import Database

HERE: tuple[Check, ...] = (disk, device, weights, server, artefacts, live_versions)
"""Checks that need no Label Studio, in their order."""
THERE: tuple[Check, ...] = (reached, failing)
"""Checks of Label Studio, after which a project is looked at, unless one of them found an error."""


class Doctor:
    """Examines a backend and, where one is named, a project."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        artefacts: ArtefactStore,
        label_studios: Clients,
    ) -> None:
        self._settings = settings
        self._database = database
        self._artefacts = artefacts
        self._label_studios = label_studios

    def examine(self, number: int | None) -> Iterator[Finding]:
        """Yields findings as they are found.

        Args:
            number: Label Studio's id of a project to look at.
        """
        backend = Examined(
            self._settings, self._database, self._artefacts, self._label_studios, number
        )
        for check in HERE:
            yield from check(backend)
        usable = True
        for check in THERE:
            for finding in check(backend):
                usable = usable and finding.status != "error"
                yield finding
        client = self._label_studios.default()
        if number is not None and client is not None and usable:
            yield from project(backend, client, number)
