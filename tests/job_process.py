"""Does a run of a job in this process: the worker's part and the job's own program together.

A worker runs the program in a process of its own and reads its reports from a pipe. Here both sides
of the pipe are in one process, which a test can kill at any step of either.
"""

from __future__ import annotations

import os
import threading

from ml_backend.backend import Backend
from ml_backend.jobs.outcomes import JobEnded, TakenOver
from ml_backend.jobs.reports import End, parse_report
from ml_backend.programs.job import main
from ml_backend.reasons import Code, reason
from ml_backend.settings import load_settings
from ml_backend.store.tables import Job

HOST = "here"


def claim(backend: Backend, job_id: int) -> Job:
    """Claims a job that is in the queue, whether or not its delay is over."""
    job = backend.jobs.get(job_id)
    assert job is not None
    claimed = backend.jobs.claim(job_id, job.run, HOST)
    assert claimed is not None, f"job {job_id} is {job.state}"
    return claimed


def run_job(job_id: int) -> int:
    """Claims a job and does one run of it, with the settings of the environment; answers 0."""
    backend = Backend(load_settings())
    follow(backend, claim(backend, job_id))
    return 0


def follow(backend: Backend, job: Job) -> None:
    """Does one run of a claimed job."""
    run = backend.job_run(job, threading.Event())
    try:
        prepared = backend.preparation.prepare(job)
    except JobEnded as ended:
        run.apply(End.of(ended))
        return
    mine, theirs = os.pipe()
    claimed = str(job.claim)

    def work() -> None:
        try:
            main(job.kind, job.id, claimed, os.getppid(), theirs, prepared)
        finally:
            os.close(theirs)

    program = threading.Thread(target=work)
    program.start()
    has_ended = False
    try:
        with os.fdopen(mine, "rb") as pipe:
            for line in pipe:
                report = parse_report(line)
                run.apply(report)
                has_ended = has_ended or isinstance(report, End)
        if not has_ended:
            run.crashed(reason(Code.PROCESS_CRASHED, kind=job.kind), 0)
    except TakenOver:
        pass
    finally:
        program.join()
