"""Words the reasons of jobs: why they wait, start, go on and are tried again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from ml_backend.reasons import Code
from ml_backend.store.states import JobKind

_WORK = {
    JobKind.TRAIN: "the training",
    JobKind.LIVE_HEAD: "fitting the live head",
    JobKind.AUTOLABEL: "auto-labelling",
    JobKind.AUTOLABEL_SHARD: "a shard of the auto-labelling",
    JobKind.PREDICT: "predicting the deferred tasks",
    JobKind.REMOVE_STALE: "removing older predictions",
}


def _too_few(v: Mapping[str, Any]) -> str:
    are = {0: "are none", 1: "is 1"}.get(v["annotated"], f"are {v['annotated']}")
    return (
        f"refused because a training needs at least {v['needed']} annotated tasks and there {are}: "
        "annotate some and ask again"
    )


def _first_training_waits(v: Mapping[str, Any]) -> str:
    missing = v["minimum"] - v["annotated"]
    return (
        f"waiting for {missing} more annotated {'task' if missing == 1 else 'tasks'} before the "
        f"first training ({v['annotated']} of {v['minimum']})"
    )


def _changes_awaited(v: Mapping[str, Any]) -> str:
    missing = v["needed"] - v["changes"]
    return (
        f"waiting for {missing} more new or changed "
        f"{'annotation' if missing == 1 else 'annotations'} ({v['changes']} of {v['needed']})"
    )


def _labelling(v: Mapping[str, Any]) -> str:
    said = f"{v['done']:,} of {v['total']:,} tasks"
    if "rate" in v:
        said += f", {v['rate']:.1f}/s, about {_duration(v['seconds_left'])} left"
    return said


_STAGES = {
    "holdout": "the hold-out",
    "fold": "the images of the fold",
    "calibration": "calibration and thresholds",
    "comparison": "comparison with the live version",
    "live": "the live version",
    "live_head": "comparison with a live head",
    "embedding": "embeddings of the images",
}


def _fold(v: Mapping[str, Any]) -> str:
    return f"fold {v['fold']} of {v['folds']}, " if "folds" in v else ""


def _training(v: Mapping[str, Any]) -> str:
    return f"{_fold(v)}training: epoch {v['epoch']:.0f}, loss {v['loss']:.2f}"


def _measuring(v: Mapping[str, Any]) -> str:
    share = f", {v['share']:.0%}" if "share" in v else ""
    return f"{_fold(v)}measuring: {_STAGES[v['stage']]}{share}"


WORDS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    Code.NONE: lambda v: "",
    Code.PLAIN: lambda v: str(v["text"]),
    Code.TOO_FEW_ANNOTATED: _too_few,
    Code.FIRST_TRAINING_WAITS: _first_training_waits,
    Code.CHANGES_AWAITED: _changes_awaited,
    Code.QUIET_TIME: lambda v: (
        f"quiet time: starts at {_time(v['at'])} unless annotations go on arriving "
        f"(at {_time(v['latest'])} in any case)"
    ),
    Code.ENOUGH_CHANGES: lambda v: (
        f"{v['changes']} new or changed annotations, {_tasks(v['annotated'])}"
    ),
    Code.ASKED_FOR: lambda v: f"asked for, with {_tasks(v['annotated'])}",
    Code.ANNOTATIONS_CHANGED: lambda v: f"annotations changed, {_tasks(v['annotated'])}",
    Code.TRAINING_RUNS: lambda v: (
        f"a training is running already, at {v['progress']:.0%}; changes that arrive meanwhile "
        "lead to the next one"
    ),
    Code.ASKED_FOR_WITH_VERSION: lambda v: f"asked for, with {v['version']}",
    Code.VERSION_IS_LIVE: lambda v: f"{v['version']} is live",
    Code.FIRST_TASKS: lambda v: "the first tasks are chosen, for how they differ",
    Code.TASKS_ARRIVED: lambda v: "new tasks have arrived",
    Code.REQUEST_LEFT_TASKS: lambda v: f"{v['tasks']} tasks left over by a request for predictions",
    Code.STALE_REMOVAL_PLANNED: lambda v: (
        f"predictions of older versions are removed at {_time(v['at'])}: somebody may have begun "
        "an annotation with one of them"
    ),
    Code.TRIED_AGAIN: lambda v: (
        f"{v['why']}; tried again (attempt {v['attempt']} of {v['attempts']})"
    ),
    Code.GAVE_UP: lambda v: f"failed after {v['attempts']} attempts: {v['why']}",
    Code.WORKER_STOPPED: lambda v: "the worker was stopped",
    Code.WORKER_LOST: lambda v: "its worker was stopped",
    Code.PROCESS_KILLED: lambda v: f"{_WORK[v['kind']]} was killed (out of memory, most likely)",
    Code.PROCESS_DIED: lambda v: f"{_WORK[v['kind']]} died of {v['signal']}",
    Code.PROCESS_CRASHED: lambda v: f"{_WORK[v['kind']]} crashed; the log has its traceback",
    Code.TIME_LIMIT: lambda v: f"{_WORK[v['kind']]} went far beyond its time budget and was ended",
    Code.NO_PROGRESS: lambda v: (
        f"{_WORK[v['kind']]} came no further for {v['seconds'] / 60:.3g} minutes and was ended"
    ),
    Code.LABEL_STUDIO_FAILS: lambda v: str(v["detail"]),
    Code.UNEXPECTED_ERROR: lambda v: str(v["detail"]),
    Code.READING_BACK: lambda v: "reading back what changed in Label Studio",
    Code.READING_IMAGES: lambda v: f"{_fold(v)}reading images: {v['done']} of {v['total']}",
    Code.TRAINING: _training,
    Code.MEASURING: _measuring,
    Code.CAMPAIGN_ROUND: lambda v: (
        f"{v['images']} images labelled; {v['stage']} ({v['share']:.0%})"
    ),
    Code.CAMPAIGN: lambda v: f"{v['number']} of {v['total']}: {v['stage']}",
    Code.CAMPAIGNS_DONE: lambda v: f"{v['total']} campaigns are done",
    Code.LABELLING: _labelling,
    Code.CHOOSING: lambda v: f"looked at {v['done']} of {v['total']} images",
    Code.SHARDS_RUN: lambda v: f"{v['done']} of {v['total']} shards done",
    Code.DEFERRED_RUN: lambda v: f"{v['done']:,} of {v['total']:,} left-over tasks predicted",
    Code.REMOVING_STALE: lambda v: (
        f"{v['removed']:,} of {v['total']:,} predictions of older versions removed"
    ),
}


def _time(moment: str) -> str:
    return f"{datetime.fromisoformat(moment):%H:%M:%S} UTC"


def _tasks(count: int) -> str:
    return f"{count} annotated {'task' if count == 1 else 'tasks'}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
