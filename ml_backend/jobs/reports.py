"""Reports of a process that does a job: lines of JSON over a pipe, which the worker stores.

The process itself only reads the database, so that a locked database delays a report and never
ends the work. The worker stores each report under the claim of its run.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, TypeAdapter

from ml_backend.jobs.outcomes import Done, Failed, JobEnded, Refused, RetryLater, TakenOver
from ml_backend.reasons import Reason

_EVERY = 1.0
"""Seconds between two reports of progress: nobody looks more often."""


class Progress(BaseModel):
    """How far the job is."""

    type: Literal["progress"] = "progress"
    fraction: float
    reason: dict[str, Any]


class Checkpoint(BaseModel):
    """How far the job is, with the state from which the next run continues."""

    type: Literal["checkpoint"] = "checkpoint"
    fraction: float
    reason: dict[str, Any]
    checkpoint: dict[str, Any]
    version: str | None = None


class Sides(BaseModel):
    """Tasks whose side, learned from or held out, was decided."""

    type: Literal["sides"] = "sides"
    rows: list[dict[str, Any]]


class ContactNote(BaseModel):
    """How a Label Studio answered."""

    type: Literal["contact"] = "contact"
    url: str
    kind: str
    detail: str


class End(BaseModel):
    """How the job ended."""

    type: Literal["end"] = "end"
    outcome: Literal["done", "refused", "failed", "retry"]
    reason: dict[str, Any]
    version: str | None = None
    result: dict[str, Any] | None = None
    wait: float = 0.0
    counts: bool = True

    @classmethod
    def of(cls, outcome: Done | JobEnded) -> End:
        """The report of an outcome."""
        why = outcome.reason.as_dict()
        match outcome:
            case Done():
                return cls(
                    outcome="done", reason=why, version=outcome.version, result=outcome.result
                )
            case Refused():
                return cls(outcome="refused", reason=why)
            case Failed():
                return cls(outcome="failed", reason=why)
            case RetryLater():
                return cls(outcome="retry", reason=why, wait=outcome.wait, counts=outcome.counts)
        raise TypeError(f"{outcome!r} is no outcome of a job")


Report = Annotated[Progress | Checkpoint | Sides | ContactNote | End, Field(discriminator="type")]
_ANY: TypeAdapter[Report] = TypeAdapter(Report)


def parse_report(line: bytes) -> Report:
    """Reads one line of the pipe.

    Raises:
        ValueError: the line is no report.
    """
    return _ANY.validate_json(line)


class Reporter:
    """Sends the reports of a job; safe to use from several threads.

    Args:
        descriptor: the pipe's end to write to.
        holds: whether the run still has the job.
    """

    def __init__(self, descriptor: int, holds: Callable[[], bool]) -> None:
        self._descriptor = descriptor
        self._holds = holds
        self._lock = threading.Lock()
        self._told = 0.0

    def check(self) -> None:
        """Makes sure that the run still has the job, before something is done elsewhere.

        Raises:
            TakenOver: another run has the job.
        """
        if not self._holds():
            raise TakenOver

    def progress(self, fraction: float, why: Reason) -> None:
        """Reports how far the job is, at most once a second."""
        if time.monotonic() < self._told + _EVERY:
            return
        self._told = time.monotonic()
        self._send(Progress(fraction=fraction, reason=why.as_dict()))

    def checkpoint(
        self,
        fraction: float,
        why: Reason,
        checkpoint: dict[str, Any],
        version: str | None = None,
    ) -> None:
        """Reports how far the job is, with the state from which the next run continues."""
        self._send(
            Checkpoint(
                fraction=fraction, reason=why.as_dict(), checkpoint=checkpoint, version=version
            )
        )

    def sides(self, rows: list[dict[str, Any]]) -> None:
        """Reports tasks whose side was decided."""
        self._send(Sides(rows=rows))

    def contact(self, url: str, kind: str, detail: str) -> None:
        """Reports how a Label Studio answered."""
        self._send(ContactNote(url=url, kind=kind, detail=detail))

    def end(self, outcome: Done | JobEnded) -> None:
        """Reports how the job ended."""
        self._send(End.of(outcome))

    def _send(self, report: BaseModel) -> None:
        content = json.dumps(report.model_dump(mode="json")).encode() + b"\n"
        with self._lock:
            while content:
                content = content[os.write(self._descriptor, content) :]
