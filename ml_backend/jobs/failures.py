"""Decides how a run ends whose Label Studio fails: one rule for all kinds of jobs."""

from __future__ import annotations

from collections.abc import Callable

from ml_backend.jobs.outcomes import JobEnded, Refused, RetryLater
from ml_backend.label_studio.errors import Forbidden, LabelStudioError, NotFound, Passing
from ml_backend.reasons import Code, reason

_REJECTED = 30.0
"""Seconds until a Label Studio that found something wrong is asked again."""


def ended_by(error: Exception, wait: Callable[[], float]) -> JobEnded | None:
    """How an error that Label Studio caused ends a run.

    Args:
        error: what was raised.
        wait: answers the seconds after which a failing Label Studio is worth asking again.

    Returns:
        The end; None where the error has another cause.
    """
    if not isinstance(error, LabelStudioError):
        return None
    why = reason(Code.LABEL_STUDIO_FAILS, detail=str(error))
    if isinstance(error, Forbidden | NotFound):
        return Refused(why)
    if isinstance(error, Passing):
        # The job is not to blame.
        return RetryLater(why, wait())
    return RetryLater(why, _REJECTED, counts=True)
