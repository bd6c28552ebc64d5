"""`python -m ml_backend.programs.predict JOB PARENT`: predicts tasks that nobody opened.

Auto-labelling runs in it, and what a request for predictions left over.
"""

from __future__ import annotations

import logging
import sys

from ml_backend.backend import Backend
from ml_backend.jobs.jobs import TakenOver
from ml_backend.label_studio.client import Forbidden, LabelStudioError, NotFound, Passing
from ml_backend.serving.autolabel import AutoLabel, AutoLabelFailed, AutoLabelRefused
from ml_backend.serving.deferred import Leftovers
from ml_backend.settings import load_settings
from ml_backend.store.tables import Project
from ml_backend.worker.supervisor import REFUSED, lower_priority

_log = logging.getLogger(__name__)

_REJECTED = 30.0
"""Seconds until a Label Studio that found something wrong is asked again."""


def main(job_id: int, parent: int) -> int:
    """Does one job; the exit status tells the supervisor how it ended."""
    lower_priority(parent)
    backend = Backend(load_settings())
    logging.basicConfig(
        level=backend.settings.log_level, format="%(asctime)s %(levelname)s auto-label: %(message)s"
    )
    job = backend.jobs.get(job_id)
    if job is None:
        raise SystemExit(f"there is no job {job_id}")
    kind = Leftovers if job.kind == "predict" else AutoLabel
    run = kind(
        backend.settings,
        backend.database,
        backend.jobs,
        backend.label_studios,
        # Made when there is something to predict: it takes seconds.
        lambda: backend.serving,
        lambda project: backend.models.version(project),
    )
    try:
        done = run.run(job)
    except (AutoLabelRefused, Forbidden, NotFound) as refused:
        backend.jobs.finish(job_id, "refused", str(refused), version=job.version)
        return REFUSED
    except AutoLabelFailed as failed:
        backend.jobs.finish(job_id, "failed", str(failed), version=job.version)
        return REFUSED
    except Passing as failure:
        # Nothing of it is the job's fault.
        with backend.database.reading() as session:
            project = session.get_one(Project, job.project_id)
        wait = backend.label_studios.wait(project)
        backend.jobs.try_again(job_id, str(failure), wait=wait, counts=False)
        return REFUSED
    except LabelStudioError as error:
        backend.jobs.try_again(job_id, str(error), wait=_REJECTED)
        return REFUSED
    except TakenOver:
        _log.warning("job %d was silent for too long, and another run has it now", job_id)
        return REFUSED
    backend.jobs.finish(job_id, "done", done.reason, version=done.version)
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
