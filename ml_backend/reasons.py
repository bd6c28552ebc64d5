"""Reasons as data: a code and values. The doors (`wording/`) make words of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Reason:
    """Why something is as it is.

    Attributes:
        code: names the reason, for programs; every code has its words in `ml_backend.wording`.
        values: JSON values that the words mention; a value may be another reason, as a dict.
    """

    code: str
    values: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The reason as JSON holds it."""
        return {"code": self.code, "values": dict(self.values)}

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Reason:
        """The reason that `as_dict` made."""
        return cls(content["code"], content.get("values", {}))
