"""Words the audits: the fate of predicted boxes, and the time that was saved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ml_backend.audits.summary import Summary
from ml_backend.reasons import Reason

WORDS = {
    "audits.blind": lambda v: (
        f"measured against {v['annotations']} annotations of tasks that are kept without boxes "
        f"({v['seconds']:.1f} s an annotation)"
    ),
    "audits.early": lambda v: (
        f"measured against {v['annotations']} annotations of tasks without boxes, {v['early']} of "
        f"them from before the first version ({v['seconds']:.1f} s an annotation)"
    ),
    "audits.stated": lambda v: (
        f"reckoned with the stated costs ({v['look']:g} s an image and {v['draw']:g} s a box), "
        f"since fewer than {v['needed']} annotations whose time is known were made without boxes"
    ),
}


def summary_lines(summary: Summary) -> list[str]:
    """Describes a summary: a line on the boxes, and one on the time where it is known."""
    ours = summary.ours
    boxes = ours.boxes
    untimed = f" ({ours.in_bulk} of them untimed)" if ours.in_bulk else ""
    lines = [
        f"of {boxes.predicted} predicted boxes in {ours.annotations} annotations{untimed}: "
        f"{boxes.accepted} accepted{_percent(boxes.accepted_share)}, {boxes.moved} moved, "
        f"{boxes.relabelled} relabelled, {boxes.deleted} deleted; {boxes.added} added by hand"
    ]
    if ours.hours_saved is not None and ours.pace is not None:
        hours = ours.hours_saved
        lines.append(
            f"{'saved' if hours >= 0 else 'lost'} {_duration(abs(hours))} "
            f"({ours.pace.mean:.1f} s an annotation with boxes), {_against(summary.against)}"
        )
    return lines


def with_words(audits: Mapping[str, Any]) -> dict[str, Any]:
    """Adds words to audits as JSON holds them: those of a summary, or of a version's card."""
    against = audits.get("against")
    if not isinstance(against, Mapping):
        # Cards of older releases hold words instead of a reason.
        return dict(audits)
    reason = Reason.of(against)
    return {
        **audits,
        "against": _against(reason),
        "against_code": reason.code,
        "against_values": dict(reason.values),
    }


def _against(reason: Reason) -> str:
    return WORDS[reason.code](reason.values)


def _percent(share: float | None) -> str:
    return "" if share is None else f" ({share:.0%})"


def _duration(hours: float) -> str:
    return f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"
