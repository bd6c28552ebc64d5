"""`POST /job_status`: tells state, progress and reason of a job."""

from __future__ import annotations

from typing import Any

from flask import Blueprint
from pydantic import BaseModel

from ml_backend.http.errors import BadRequest
from ml_backend.http.request import backend, read_body
from ml_backend.wording import told

blueprint = Blueprint("job_status", __name__)


class JobStatus(BaseModel):
    """Holds the body: the job that `/train` or START_TRAINING answered."""

    job: str | int


@blueprint.post("/job_status")
def job_status() -> dict[str, Any]:
    """Answers state, reason and progress of a job."""
    number = str(read_body(JobStatus).job)
    job = backend().jobs.get(int(number)) if number.isdecimal() and len(number) < 18 else None
    if job is None:
        raise BadRequest(f"there is no job {number}")
    return {
        "job": job.id,
        "kind": job.kind,
        "job_status": job.state,
        **told("reason", job.reason),
        "progress": round(job.progress, 3),
        "created_at": job.created_at.isoformat(),
        "finished_at": job.finished_at.isoformat() if job.finished_at else None,
        "version": job.version,
    }
