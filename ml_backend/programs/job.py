"""Does one job in a process of its own: `python -m ml_backend.programs.job KIND JOB CLAIM …`.

Its worker starts it (`ml_backend.worker.supervisor`), reads its reports from the pipe, and stores
them. The process itself only reads the database.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from typing import Any

from ml_backend.backend import Backend
from ml_backend.jobs.failures import ended_by
from ml_backend.jobs.outcomes import Done, Failed, JobEnded, RetryLater, TakenOver
from ml_backend.jobs.reports import Reporter
from ml_backend.reasons import Code, reason
from ml_backend.settings import load_settings
from ml_backend.store.states import JobKind
from ml_backend.store.tables import Job
from ml_backend.worker.processes import lower_priority

_log = logging.getLogger(__name__)

_NO_ROOM = 60.0
"""Seconds, for each attempt, until a job whose file could not be written is tried again: time to
make room on a full disk."""


def main(
    kind: JobKind, job_id: int, claim: str, parent: int, pipe: int, prepared: Mapping[str, Any]
) -> int:
    """Does one job and reports how it ended; answers the exit status.

    Args:
        kind: of the job.
        job_id: the job.
        claim: of the run that it is done for.
        parent: process id of the worker.
        pipe: descriptor that reports are written to.
        prepared: values that the worker's preparation answered (`ml_backend.worker.preparation`).
    """
    lower_priority(parent)
    settings = load_settings()
    logging.basicConfig(
        level=settings.log_level, format=f"%(asctime)s %(levelname)s {kind}: %(message)s"
    )
    report = Reporter(pipe, lambda: backend.jobs.holds(job_id, claim))
    backend = Backend(settings, report)
    job = backend.jobs.claimed(job_id, claim)
    if job is None:
        _log.warning("job %d has been given to another run", job_id)
        return 0
    try:
        report.end(run(backend, job, report, prepared))
    except TakenOver:
        _log.warning("job %d was silent for too long, and another run has it now", job_id)
    return 0


def run(
    backend: Backend, job: Job, report: Reporter, prepared: Mapping[str, Any]
) -> Done | JobEnded:
    """Does a claimed job of any kind; answers how it ended.

    Raises:
        TakenOver: another run has the job.
    """
    try:
        if job.kind in (JobKind.TRAIN, JobKind.LIVE_HEAD):
            return _train(backend, job, report, prepared.get("label_studio_fails"))
        return _RUNNERS[job.kind](backend, job, report)
    except JobEnded as ended:
        return ended
    except Exception as error:
        known = ended_by(error, lambda: backend.label_studios.wait_for(job.project_id))
        known = known or _own_failure(error, job)
        if known is None:
            raise
        return known


def _train(backend: Backend, job: Job, report: Reporter, label_studio_fails: str | None) -> Done:
    from ml_backend.training.run import TrainingRun

    training = TrainingRun(
        backend.settings,
        backend.database,
        backend.artefacts,
        backend.label_studios,
        report,
        label_studio_fails,
    )
    return training.run(job.project_id, job.kind)


def _autolabel(backend: Backend, job: Job, report: Reporter) -> Done:
    from ml_backend.serving.autolabel import AutoLabel

    return AutoLabel(backend.prediction_parts(report)).run(job)


def _shard(backend: Backend, job: Job, report: Reporter) -> Done:
    from ml_backend.serving.autolabel import AutoLabel

    return AutoLabel(backend.prediction_parts(report)).run_shard(job)


def _predict(backend: Backend, job: Job, report: Reporter) -> Done:
    from ml_backend.serving.deferred import DeferredPredictions

    return DeferredPredictions(backend.prediction_parts(report)).run(job)


def _remove_stale(backend: Backend, job: Job, report: Reporter) -> Done:
    from ml_backend.serving.stale_predictions import StalePredictions

    return StalePredictions(backend.database, backend.label_studios, report).run(job)


_RUNNERS = {
    JobKind.AUTOLABEL: _autolabel,
    JobKind.AUTOLABEL_SHARD: _shard,
    JobKind.PREDICT: _predict,
    JobKind.REMOVE_STALE: _remove_stale,
}


def _own_failure(error: Exception, job: Job) -> JobEnded | None:
    """How a failure of the work itself ends the job; None for a fault of this program."""
    from safetensors import SafetensorError

    from ml_backend.detection.training import TrainingDiverged

    if isinstance(error, TrainingDiverged):
        # Another attempt begins with the same seed and would diverge again.
        return Failed(reason(Code.DIVERGED, detail=str(error)))
    if isinstance(error, OSError | SafetensorError):
        _log.exception("job %d could not go on", job.id)
        why = reason(Code.FILE_ERROR, kind=job.kind, detail=str(error))
        return RetryLater(why, _NO_ROOM * job.attempt, counts=True)
    return None


if __name__ == "__main__":
    _kind, _job, _claim, _parent, _pipe, _prepared = sys.argv[1:]
    sys.exit(
        main(JobKind(_kind), int(_job), _claim, int(_parent), int(_pipe), json.loads(_prepared))
    )
