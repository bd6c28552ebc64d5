"""Predicts the tasks that a request for predictions did not finish, and imports the predictions."""

from __future__ import annotations

import time
from typing import Any

from ml_backend.jobs.outcomes import Done, Failed
from ml_backend.jobs.payloads import DeferredCheckpoint, DeferredPayload
from ml_backend.reasons import Code, reason
from ml_backend.serving.job_parts import AT_ONCE, PATIENCE, PredictionParts
from ml_backend.store.tables import Job


class DeferredPredictions:
    """Predicts for the tasks of a job and imports the predictions over the API.

    Args:
        parts: what the job works with.
    """

    def __init__(self, parts: PredictionParts) -> None:
        self._parts = parts

    def run(self, job: Job) -> Done:
        """Does a claimed job, from where it was left.

        A task that holds a prediction of the version already is passed over, so that a job that is
        tried again doubles nothing.

        Raises:
            Refused: there is no token, no label to detect, or no version.
            Failed: no image can be read.
            TakenOver: another run has the job.
            LabelStudioError: Label Studio could not do what was asked; imported predictions stay.
        """
        tasks = DeferredPayload.model_validate(job.payload).tasks
        reached = DeferredCheckpoint.model_validate(job.checkpoint)
        version = job.version
        while reached.done < len(tasks):
            version = self._predict_some(job, tasks, reached)
            self._parts.report.checkpoint(
                reached.done / len(tasks),
                reason(Code.DEFERRED_RUN, done=reached.done, total=len(tasks)),
                reached.stored(),
                version,
            )
        left_out = {"left_out": reached.left_out, "example": reached.example}
        if reached.left_out and not reached.imported:
            raise Failed(reason(Code.NO_TASK_PREDICTED, **left_out))
        return Done(
            reason(
                Code.DEFERRED_PREDICTED, imported=reached.imported, total=len(tasks), **left_out
            ),
            version,
        )

    def _predict_some(
        self, job: Job, all_tasks: list[dict[str, Any]], reached: DeferredCheckpoint
    ) -> str:
        """Predicts the next tasks with the version that is live now; answers the version."""
        project = self._parts.project(job.project_id)
        client, config = self._parts.client_and_config(project)
        if project.live_version is None:
            self._parts.pretrained_version(project)
        tasks = all_tasks[reached.done : reached.done + AT_ONCE]
        predicted = self._parts.serving().predict(
            project, config, tasks, deadline=time.monotonic() + PATIENCE
        )
        has = client.predicted_tasks(
            project.label_studio_id, predicted.version, [task["id"] for task in tasks]
        )
        predictions = []
        for task, result in zip(tasks, predicted.results, strict=True):
            if task["id"] in has:
                continue
            if result is not None:
                predictions.append({"task": task["id"], **result})
                continue
            reached.left_out += 1
            reached.example = reached.example or self._parts.why_not(project, config, task)
        self._parts.report.check()
        reached.imported += client.import_predictions(project.label_studio_id, predictions)
        reached.done += len(tasks)
        return predicted.version
