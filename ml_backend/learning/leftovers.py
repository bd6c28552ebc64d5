"""Finishes what a request for predictions left over at its deadline, and imports it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from ml_backend.label_studio.label_config import parse_label_config
from ml_backend.learning.jobs import Jobs
from ml_backend.learning.label_studios import LabelStudios
from ml_backend.store.database import Database
from ml_backend.store.tables import Job, Project

if TYPE_CHECKING:
    from ml_backend.learning.serving import Serving

_CHUNK = 100


class Leftovers:
    """Predicts for the tasks of a job and imports the predictions over the API."""

    def __init__(
        self, database: Database, label_studios: LabelStudios, serving: Callable[[], Serving]
    ) -> None:
        self._database = database
        self._label_studios = label_studios
        self._serving = serving

    def finish(self, job: Job, jobs: Jobs) -> str:
        """Does a job's tasks, a chunk at a time; answers in words what came of it.

        A task that holds a prediction of the version already is left out, so that a job that is
        tried again doubles nothing.

        Raises:
            LabelStudioError: Label Studio could not be reached; what is imported stays.
        """
        with self._database.reading() as session:
            project = session.get_one(Project, job.project_id)
        tasks = job.payload["tasks"]
        client = self._label_studios.client(project)
        if client is None:
            return (
                f"{len(tasks)} tasks were left without predictions: without "
                "LABEL_STUDIO_API_KEY they cannot be imported"
            )
        config = parse_label_config(project.label_config)
        imported = 0
        for start in range(0, len(tasks), _CHUNK):
            chunk = tasks[start : start + _CHUNK]
            predicted = self._serving().predict(
                project, config, chunk, deadline=time.monotonic() + 3600
            )
            has = client.predicted_tasks(
                project.label_studio_id, predicted.version, [t["id"] for t in chunk]
            )
            imported += client.import_predictions(
                project.label_studio_id,
                [
                    {"task": task["id"], **result}
                    for task, result in zip(chunk, predicted.results, strict=True)
                    if result is not None and task["id"] not in has
                ],
            )
            done = start + len(chunk)
            jobs.progress(job.id, done / len(tasks), f"{done} of {len(tasks)} tasks predicted")
        return f"{imported} predictions imported for {len(tasks)} left-over tasks"
