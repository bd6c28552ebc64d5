"""`python -m ml_backend.programs.train JOB PARENT`: a training's process."""

from __future__ import annotations

import logging
import sys
import time

from safetensors import SafetensorError

from ml_backend.backend import Backend
from ml_backend.detection.training import TrainingDiverged
from ml_backend.jobs.jobs import TakenOver
from ml_backend.settings import load_settings
from ml_backend.training.run import PutOff, TrainingRefused, TrainingRun
from ml_backend.worker.supervisor import REFUSED, lower_priority

_log = logging.getLogger(__name__)

_NO_ROOM = 60.0
"""Seconds, for each attempt, that an admin has to make room on a full disk."""


def main(job_id: int, parent: int) -> int:
    """Runs one training; the exit status tells the supervisor how it ended."""
    lower_priority(parent)
    backend = Backend(load_settings())
    logging.basicConfig(
        level=backend.settings.log_level, format="%(asctime)s %(levelname)s training: %(message)s"
    )
    job = backend.jobs.get(job_id)
    if job is None:
        raise SystemExit(f"there is no job {job_id}")
    last_told = 0.0

    def tell(fraction: float, words: str) -> None:
        nonlocal last_told
        if time.monotonic() - last_told > 1:
            last_told = time.monotonic()
            backend.jobs.hold(job, progress=fraction, reason=words)

    run = TrainingRun(
        backend.settings, backend.database, backend.artefacts, backend.label_studios, tell
    )
    try:
        outcome = run.run(job.project_id)
    except TrainingRefused as refused:
        backend.jobs.finish(job_id, "refused", str(refused))
        return REFUSED
    except PutOff as reason:
        backend.jobs.try_again(job_id, str(reason), wait=reason.wait, counts=False)
        return REFUSED
    except (OSError, SafetensorError) as error:
        _log.exception("the training could not go on")
        words = f"the training could not write or read a file: {error}"
        backend.jobs.try_again(job_id, words, wait=_NO_ROOM * job.attempt)
        return REFUSED
    except TrainingDiverged as diverged:
        # It would again: another attempt begins with the same seed.
        backend.jobs.finish(job_id, "failed", f"failed: {diverged}")
        return REFUSED
    except TakenOver:
        _log.warning("job %d was silent for too long, and another run has it now", job_id)
        return REFUSED
    backend.jobs.finish(job_id, "done", outcome.verdict.reason, version=outcome.version)
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
