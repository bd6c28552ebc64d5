"""Defines how a run of a job ends: with `Done`, or with an exception of this file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ml_backend.reasons import Reason


@dataclass(frozen=True, slots=True)
class Done:
    """The work is done.

    Attributes:
        reason: the result.
        version: the model version that was made or that predicted.
        result: values that the worker stores along with the end of the job; their names depend on
            the kind of the job.
    """

    reason: Reason
    version: str | None = None
    result: dict[str, Any] | None = None


class JobEnded(Exception):
    """The run ends without having done its work.

    Args:
        reason: why.
    """

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason.code, dict(reason.values))
        self.reason = reason


class Refused(JobEnded):
    """Somebody must change something before the job can be done; the reason says what to change."""


class Failed(JobEnded):
    """Something is wrong that another attempt would not mend."""


class RetryLater(JobEnded):
    """The job cannot be done now, and can later.

    Args:
        reason: why.
        wait: seconds until the next attempt.
        counts: whether this attempt counts against the job.
    """

    def __init__(self, reason: Reason, wait: float, *, counts: bool = False) -> None:
        super().__init__(reason)
        self.wait = wait
        self.counts = counts


class TakenOver(Exception):
    """Another run has the job: this one was silent for too long and was taken for dead."""
