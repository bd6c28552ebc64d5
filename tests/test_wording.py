"""Words of reasons: every code has some, and reasons within reasons are worded as well."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import ml_backend
from ml_backend.reasons import Code, Reason, reason
from ml_backend.store.states import JobKind
from ml_backend.wording import WORDS, told, words

ROOMS = ("audits", "connect", "label_value")
"""Rooms whose reasons are data."""


def test_words_every_code_has_some() -> None:
    assert set(Code) - set(WORDS) == set()


def test_words_tried_again_contain_those_of_the_nested_reason() -> None:
    crashed = reason(Code.PROCESS_CRASHED, kind=JobKind.TRAIN)
    again = reason(Code.TRIED_AGAIN, why=crashed, attempt=2, attempts=3)
    assert words(again) == (
        "the training crashed; the log has its traceback; tried again (attempt 2 of 3)"
    )


def test_words_gave_up_contain_those_of_the_nested_reason() -> None:
    gave_up = reason(Code.GAVE_UP, attempts=3, why=reason(Code.WORKER_LOST))
    assert words(gave_up) == "failed after 3 attempts: its worker was stopped"


def test_words_nested_twice_contain_the_innermost() -> None:
    fails = reason(Code.LABEL_STUDIO_FAILS, detail="http://ls: 500")
    again = reason(Code.TRIED_AGAIN, why=fails, attempt=2, attempts=3)
    gave_up = reason(Code.GAVE_UP, attempts=3, why=again)
    assert words(gave_up).startswith("failed after 3 attempts: http://ls: 500; tried again")


@pytest.mark.parametrize("kind", JobKind)
@pytest.mark.parametrize(
    ("code", "values"),
    [
        (Code.PROCESS_KILLED, {}),
        (Code.PROCESS_DIED, {"signal": "SIGSEGV"}),
        (Code.PROCESS_CRASHED, {}),
        (Code.TIME_LIMIT, {}),
        (Code.NO_PROGRESS, {"seconds": 900}),
    ],
)
def test_words_end_of_a_process_name_every_kind_of_job(
    kind: JobKind, code: Code, values: dict[str, object]
) -> None:
    said = words(reason(code, kind=kind, **values))
    assert said
    # Once stored as JSON, a kind is plain text.
    assert said == words(Reason(code.value, {"kind": kind.value, **values}))


def test_words_unknown_code_raises_key_error() -> None:
    with pytest.raises(KeyError, match=r"other\.unknown"):
        words(Reason("other.unknown"))


def test_told_reason_has_words_code_and_values() -> None:
    assert told("reason", reason(Code.VERSION_IS_LIVE, version="v2")) == {
        "reason": "v2 is live",
        "reason_code": "jobs.version_is_live",
        "reason_values": {"version": "v2"},
    }


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
