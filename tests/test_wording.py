"""Words of reasons: every code that the program uses has some."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import ml_backend
from ml_backend.reasons import Reason
from ml_backend.wording import WORDS, told, words

ROOMS = ("audits", "connect", "label_value")
"""Rooms whose reasons are data."""


def test_words_every_code_in_the_program_has_words_and_no_words_are_left_over() -> None:
    root = Path(ml_backend.__file__).parent
    code = re.compile(rf'"((?:{"|".join(ROOMS)})\.[a-z_]+)"')
    used = {
        found
        for file in root.rglob("*.py")
        if "wording" not in file.parts
        for found in code.findall(file.read_text())
    }
    # Codes that are put together from a room and one of several names.
    connect = (root / "projects/connect.py").read_text()
    used |= {f"connect.{name}" for name in re.findall(r'done\.add\(\s*"([a-z_]+)"', connect)}
    used |= {f"connect.{name}" for name in ("connected", "was_connected")}
    used |= {
        f"label_value.{name}" for name in ("stop", "correcting", "unsettled", "go_on", "noise")
    }
    assert used == {code for code in WORDS if code.partition(".")[0] in ROOMS}


def test_told_gives_words_code_and_values_under_one_key() -> None:
    reason = Reason("connect.read_back", {"annotated": 24})
    assert told("reason", reason) == {
        "reason": "read back from Label Studio: 24 annotated tasks",
        "reason_code": "connect.read_back",
        "reason_values": {"annotated": 24},
    }


def test_words_unknown_code_is_an_error() -> None:
    with pytest.raises(KeyError, match="no_such"):
        words(Reason("no_such.code"))
