"""Words the verdicts on versions, and promotions and rollbacks by admins."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ml_backend.reasons import Code


def _change(v: Mapping[str, Any]) -> str:
    return f"{v['delta']:+.3f} (90 % interval {v['low']:+.3f} to {v['high']:+.3f})"


def _finds_new_label(v: Mapping[str, Any]) -> str:
    found = ", ".join(f"{label} (AP50 {ap50:.2f})" for label, ap50 in v["found"].items())
    return (
        f"promoted: finds {found}, which {v['live']} does not know, and is little behind on the "
        f"others, AP50 {_change(v)}"
    )


def _live_head(v: Mapping[str, Any]) -> str:
    said = f"promoted: a live head of {v['images']} images, AP50 {v['ap50']:.2f}"
    if v["withheld"]:
        said += (
            f"; boxes of {', '.join(v['withheld'])} are withheld until they cost less than drawing"
        )
    return said


WORDS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    Code.FIRST_VERSION: lambda v: (
        f"promoted: the first version that finds something, AP50 {v['ap50']:.2f}"
    ),
    Code.LIVE_HEAD_FITTED: _live_head,
    Code.FIRST_VERSION_WEAK: lambda v: (
        f"not promoted: AP50 {v['ap50']:.2f} is below {v['needed']}; annotate more"
    ),
    Code.NOT_WORSE: lambda v: f"promoted: not worse than {v['live']}, AP50 {_change(v)}",
    Code.WORSE: lambda v: f"not promoted: worse than {v['live']} by AP50 {_change(v)}",
    Code.WORSE_THAN_LIVE_HEAD: lambda v: (
        f"not promoted: worse by AP50 {_change(v)} than the live head, which learns the same "
        "images in seconds; annotate more"
    ),
    Code.BEHIND_BEST: lambda v: (
        f"not promoted: behind {v['best']}, the best so far on the hold-out, by AP50 {_change(v)}"
    ),
    Code.LABEL_FALLS: lambda v: (
        f"not promoted: {v['label']} falls by {v['fall']:.2f} AP50 against {v['live']}, though the "
        f"mean changes by {_change(v)}"
    ),
    Code.FINDS_NEW_LABEL: _finds_new_label,
    Code.OVERTAKEN: lambda v: (
        f"not promoted: meanwhile {v['live']} was made live, and it was compared with "
        f"{v['parent'] or 'none'}; the next training compares anew, or `ml-backend promote` puts "
        "it live"
    ),
    Code.PROMOTED_ON_REQUEST: lambda v: "promoted on request",
    Code.ROLLED_BACK_FROM: lambda v: f"rolled back from {v['version']}",
    Code.AUDITED_WORSE: lambda v: (
        f"rolled back to {v['version']}: of its boxes people accepted {v['share']:.0%} in "
        f"{v['images']} images, of those of {v['version']} {v['before']:.0%} in "
        f"{v['images_before']}"
    ),
    Code.ROLLED_BACK_TO: lambda v: f"rolled back to {v['version']} on request",
}
