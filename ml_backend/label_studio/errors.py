"""The errors of requests to Label Studio."""

from __future__ import annotations

GUARD = (
    "set ML_BLOCK_LOCAL_IP=false and SSRF_PROTECTION_ENABLED=false on the Label Studio side and "
    "restart it: by default it refuses private and loopback addresses"
)
"""The remedy where Label Studio refuses to reach the backend."""


class LabelStudioError(RuntimeError):
    """A request to Label Studio failed; the text says why, and the remedy."""


class Passing(LabelStudioError):
    """The same request may succeed later, by itself or after an admin's repair.

    Attributes:
        kind: the fault in a word or two.
    """

    kind = ""


class Unreachable(Passing):
    """Label Studio does not answer at its address, or not in time."""

    kind = "unreachable"


class Failed(Passing):
    """Label Studio answers with a status of 500 or more."""

    kind = "failed"


class Unauthorized(Passing):
    """Label Studio does not accept the token."""

    kind = "unauthorized"


class Forbidden(LabelStudioError):
    """Label Studio does not allow the request."""


class NotFound(LabelStudioError):
    """The object does not exist, or the token's user may not see it."""


class Rejected(LabelStudioError):
    """Label Studio rejects the content of the request."""


class BadAnswer(Passing):
    """The answer is not one that Label Studio gives."""

    kind = "bad answer"
