"""Makes words of reasons. Only the doors do: everything below works with codes and values.

Each room that has reasons has a file here, with a table from code to words.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ml_backend.reasons import Reason
from ml_backend.wording import audits, connect, label_value

WORDS: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    **audits.WORDS,
    **connect.WORDS,
    **label_value.WORDS,
}
"""Every code, and the function that makes its words of its values."""


def words(reason: Reason) -> str:
    """Makes a sentence of a reason.

    Raises:
        KeyError: the code is unknown, or a value is missing.
    """
    return WORDS[reason.code](reason.values)


def told(key: str, reason: Reason) -> dict[str, Any]:
    """Describes a reason as JSON answers hold it: words under a key, code and values beside it.

    Args:
        key: `reason` gives `reason`, `reason_code` and `reason_values`.
        reason: the reason.
    """
    return {key: words(reason), f"{key}_code": reason.code, f"{key}_values": dict(reason.values)}
