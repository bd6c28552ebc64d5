"""Makes words of reasons, for the doors; all rooms below them work with codes and values.

Each room that has reasons has a file here, with a table from code to words.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ml_backend.reasons import Reason
from ml_backend.wording import (
    audits,
    connect,
    doctor,
    jobs,
    label_value,
    predictions,
    training,
    versions,
)

WORDS: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    **audits.WORDS,
    **connect.WORDS,
    **doctor.WORDS,
    **jobs.WORDS,
    **label_value.WORDS,
    **predictions.WORDS,
    **training.WORDS,
    **versions.WORDS,
}
"""Functions that make words of a reason's values, by code."""


def words(reason: Reason) -> str:
    """Makes a sentence of a reason.

    Raises:
        KeyError: the code is unknown, or a value is missing.
    """
    values = {k: _inner(v) for k, v in reason.values.items()}
    return WORDS[reason.code](values)


def told(key: str, reason: Reason) -> dict[str, Any]:
    """Describes a reason as JSON answers hold it: words under a key, code and values beside it.

    Args:
        key: `reason` gives `reason`, `reason_code` and `reason_values`.
        reason: the reason.
    """
    return {key: words(reason), f"{key}_code": reason.code, f"{key}_values": dict(reason.values)}


def _inner(value: Any) -> Any:
    """Makes words of a value that is a reason itself."""
    if isinstance(value, Mapping) and set(value) == {"code", "values"}:
        return words(Reason.of(value))
    return value
