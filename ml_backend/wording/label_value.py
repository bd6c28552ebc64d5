"""Words the value of further labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def _too_early(values: Mapping[str, Any]) -> str:
    missing = values["missing"]
    return (
        f"too early to say what the next labels are worth: {missing} more "
        + ("training tells" if missing == 1 else "trainings tell")
        + _signs(values)
    )


def _gain(values: Mapping[str, Any], advice: str) -> str:
    return (
        f"the next {values['images']} images are worth {100 * values['gain']:+.1f} points of AP50 "
        f"({100 * values['low']:+.1f} to {100 * values['high']:+.1f}, 90 %){_signs(values)}; "
        + advice
    )


def _signs(values: Mapping[str, Any]) -> str:
    said = ""
    if (untouched := values["untouched"]) is not None:
        said += f"; people leave {untouched:.0%} of the boxes untouched"
    if (agreement := values["agreement"]) is not None:
        said += f"; the newest two versions agree in {agreement:.0%} of their boxes"
    return said


WORDS = {
    "label_value.too_early": _too_early,
    "label_value.stop": lambda v: _gain(
        v, "more labels teach little: it is time to stop, or to look for images that differ"
    ),
    "label_value.unsettled": lambda v: _gain(
        v, "more labels raise the score little, but versions still differ"
    ),
    "label_value.correcting": lambda v: _gain(
        v, "more labels raise the score little, but people still correct much"
    ),
    "label_value.go_on": lambda v: _gain(v, "go on"),
    "label_value.noise": lambda v: _gain(
        v, "go on: whether it still rises cannot be told from the noise"
    ),
}
