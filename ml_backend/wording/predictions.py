"""Words the outcomes of jobs that make or remove predictions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ml_backend.reasons import Code


def _superseded(v: Mapping[str, Any]) -> str:
    if v["version"] is None:
        return "superseded by the first version"
    return f"superseded by {v['version']} at {v['done']:,} of {v['total']:,} tasks"


def _stale_removed(v: Mapping[str, Any]) -> str:
    said = f"{v['removed']:,} predictions of older versions removed"
    if v["versions"]:
        said += f" ({', '.join(v['versions'])})"
    return f"{said}, and {v['doubled']} doubled ones" if v["doubled"] else said


def _left_out(v: Mapping[str, Any]) -> str:
    if not v["left_out"]:
        return ""
    return f"; {v['left_out']:,} left out, for example {v['example']}"


WORDS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    Code.NO_TOKEN: lambda v: (
        "refused because predictions cannot be imported without a token: set LABEL_STUDIO_URL and "
        "LABEL_STUDIO_API_KEY"
    ),
    Code.NO_VERSION: lambda v: (
        "refused because the project has no model version yet: annotate "
        f"{v['minimum']} tasks, and the first training makes one"
    ),
    Code.VERSION_UNLOADABLE: lambda v: (
        f"{v['version']} cannot be loaded ({v['instead']} predicts in its place): the log says why"
    ),
    Code.SUPERSEDED: _superseded,
    Code.TASKS_CHOSEN: lambda v: f"{v['tasks']} tasks chosen to begin with, for how they differ",
    Code.NOTHING_TO_PREDICT: lambda v: (
        f"every task without an annotation has one of {v['version']}"
    ),
    Code.TASKS_PREDICTED: lambda v: (
        f"{v['imported']:,} of {v['done']:,} tasks predicted by {v['version']}{_left_out(v)}"
    ),
    Code.NO_TASK_PREDICTED: lambda v: f"no task could be predicted{_left_out(v)}",
    Code.DEFERRED_PREDICTED: lambda v: (
        f"{v['imported']:,} predictions imported for {v['total']:,} left-over tasks{_left_out(v)}"
    ),
    Code.AUDITS_FIRST: lambda v: "what people made of the older predictions is counted first",
    Code.STALE_REMOVED: _stale_removed,
    Code.STALE_KEPT: lambda v: "nothing was removed: LABEL_STUDIO_API_KEY is not set any more",
}
