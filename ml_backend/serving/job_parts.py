"""Holds what the jobs that predict have in common: their parts and their checks."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ml_backend.detection.decoding import UndecodableImage
from ml_backend.jobs.outcomes import Refused
from ml_backend.jobs.reports import Reporter
from ml_backend.label_studio.client import LabelStudioClient
from ml_backend.label_studio.images import ImageUnavailable
from ml_backend.label_studio.label_config import (
    LabelConfig,
    LabelConfigError,
    parse_label_config,
)
from ml_backend.label_studio.media import read_image
from ml_backend.projects.clients import Clients
from ml_backend.reasons import Code, reason
from ml_backend.remedies import with_remedy
from ml_backend.settings import Settings
from ml_backend.store.database import Database
from ml_backend.store.tables import PRETRAINED, Project

if TYPE_CHECKING:
    from ml_backend.serving.predictions import Serving

AT_ONCE = 100
"""Tasks of one request to the model."""
PATIENCE = 600.0
"""Seconds that the images of one request to the model may take."""
_LOADING = 60.0
"""Seconds within which COCO's weights must be loaded."""


@dataclass(frozen=True, slots=True)
class PredictionParts:
    """Bundles the objects that a job which predicts works with.

    Attributes:
        settings: limits of images.
        database: which version is live; it is only read.
        label_studios: where tasks are read and predictions go.
        serving: makes the predictor, which takes seconds; called when there is something to
            predict.
        version_of: the version that a prediction made now would carry.
        report: hears how far the job is.
    """

    settings: Settings
    database: Database
    label_studios: Clients
    serving: Callable[[], Serving]
    version_of: Callable[[Project], str]
    report: Reporter

    def project(self, project_id: int) -> Project:
        """Reads the project's row."""
        with self.database.reading() as session:
            return session.get_one(Project, project_id)

    def client_and_config(self, project: Project) -> tuple[LabelStudioClient, LabelConfig]:
        """Makes the client of a project, and parses its label config.

        Raises:
            Refused: there is no token, or no label to detect.
        """
        client = self.label_studios.client(project)
        if client is None:
            raise Refused(reason(Code.NO_TOKEN))
        try:
            return client, parse_label_config(project.label_config)
        except LabelConfigError as error:
            raise Refused(reason(Code.LABEL_CONFIG_UNUSABLE, detail=str(error))) from error

    def pretrained_version(self, project: Project) -> str:
        """Waits while COCO's weights load, for a project before its first training.

        Raises:
            Refused: COCO's weights cannot be had.
        """
        until = time.monotonic() + (0 if self.settings.weights == "none" else _LOADING)
        while self.version_of(project) != PRETRAINED:
            if time.monotonic() >= until:
                raise Refused(reason(Code.NO_VERSION, minimum=self.settings.train_min))
            time.sleep(0.5)
        return PRETRAINED

    def why_not(self, project: Project, config: LabelConfig, task: dict[str, Any]) -> str:
        """Finds out why a task has no prediction, by reading its images once more."""
        images = self.label_studios.images(project)
        try:
            for controls in config.controls_by_image().values():
                read_image(images, task, controls[0], max_pixels=self.settings.image_max_pixels)
        except (ImageUnavailable, UndecodableImage) as error:
            return f"task {task['id']}: {with_remedy(error)}"
        return f"task {task['id']}: the log says why"
