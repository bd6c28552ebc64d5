"""Reasons as data: a code and values. The doors (`wording/`) make words of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Code(StrEnum):
    """Codes of reasons; `ml_backend.wording` holds the words of each."""

    NONE = "none"
    PLAIN = "plain"
    """Words that an earlier release stored."""

    # When a training is due.
    TOO_FEW_ANNOTATED = "jobs.too_few_annotated"
    FIRST_TRAINING_WAITS = "jobs.first_training_waits"
    CHANGES_AWAITED = "jobs.changes_awaited"
    QUIET_TIME = "jobs.quiet_time"
    ENOUGH_CHANGES = "jobs.enough_changes"
    ASKED_FOR = "jobs.asked_for"
    TRAINING_RUNS = "jobs.training_runs"
    ANNOTATIONS_CHANGED = "jobs.annotations_changed"

    # Why predictions are made or removed.
    ASKED_FOR_WITH_VERSION = "jobs.asked_for_with_version"
    VERSION_IS_LIVE = "jobs.version_is_live"
    FIRST_TASKS = "jobs.first_tasks"
    TASKS_ARRIVED = "jobs.tasks_arrived"
    REQUEST_LEFT_TASKS = "jobs.request_left_tasks"
    STALE_REMOVAL_PLANNED = "jobs.stale_removal_planned"

    # Attempts of a job.
    TRIED_AGAIN = "jobs.tried_again"
    GAVE_UP = "jobs.gave_up"
    WORKER_STOPPED = "jobs.worker_stopped"
    WORKER_LOST = "jobs.worker_lost"
    PROCESS_KILLED = "jobs.process_killed"
    PROCESS_DIED = "jobs.process_died"
    PROCESS_CRASHED = "jobs.process_crashed"
    TIME_LIMIT = "jobs.time_limit"
    NO_PROGRESS = "jobs.no_progress"
    LABEL_STUDIO_FAILS = "jobs.label_studio_fails"
    UNEXPECTED_ERROR = "jobs.unexpected_error"

    # How far a job is.
    READING_BACK = "jobs.reading_back"
    READING_IMAGES = "jobs.reading_images"
    TRAINING = "jobs.training"
    MEASURING = "jobs.measuring"
    CAMPAIGN_ROUND = "jobs.campaign_round"
    CAMPAIGN = "jobs.campaign"
    CAMPAIGNS_DONE = "jobs.campaigns_done"
    LABELLING = "jobs.labelling"
    CHOOSING = "jobs.choosing"
    SHARDS_RUN = "jobs.shards_run"
    DEFERRED_RUN = "jobs.deferred_run"
    REMOVING_STALE = "jobs.removing_stale"

    # Why a training came to nothing.
    LABEL_CONFIG_UNUSABLE = "training.label_config_unusable"
    SETTING_WRONG = "training.setting_wrong"
    FILE_ERROR = "training.file_error"
    DIVERGED = "training.diverged"
    TOO_FEW_IMAGES = "training.too_few_images"
    ONE_TASK_ONLY = "training.one_task_only"
    NO_BOXES = "training.no_boxes"
    TRAINED_IS_LIVE = "training.trained_is_live"

    # Whether a version goes live.
    FIRST_VERSION = "versions.first_version"
    LIVE_HEAD_FITTED = "versions.live_head_fitted"
    FIRST_VERSION_WEAK = "versions.first_version_weak"
    NOT_WORSE = "versions.not_worse"
    WORSE = "versions.worse"
    WORSE_THAN_LIVE_HEAD = "versions.worse_than_live_head"
    BEHIND_BEST = "versions.behind_best"
    LABEL_FALLS = "versions.label_falls"
    FINDS_NEW_LABEL = "versions.finds_new_label"
    OVERTAKEN = "versions.overtaken"
    PROMOTED_ON_REQUEST = "versions.promoted_on_request"
    ROLLED_BACK_FROM = "versions.rolled_back_from"
    ROLLED_BACK_TO = "versions.rolled_back_to"
    AUDITED_WORSE = "versions.audited_worse"

    # What auto-labelling and its like came to.
    NO_TOKEN = "predictions.no_token"  # noqa: S105
    NO_VERSION = "predictions.no_version"
    VERSION_UNLOADABLE = "predictions.version_unloadable"
    SUPERSEDED = "predictions.superseded"
    TASKS_CHOSEN = "predictions.tasks_chosen"
    NOTHING_TO_PREDICT = "predictions.nothing_to_predict"
    TASKS_PREDICTED = "predictions.tasks_predicted"
    NO_TASK_PREDICTED = "predictions.no_task_predicted"
    DEFERRED_PREDICTED = "predictions.deferred_predicted"
    AUDITS_FIRST = "predictions.audits_first"
    STALE_REMOVED = "predictions.stale_removed"
    STALE_KEPT = "predictions.stale_kept"


@dataclass(frozen=True, slots=True)
class Reason:
    """Why something is as it is.

    Attributes:
        code: names the reason, for programs.
        values: JSON values that the words mention; a value may be another reason, as a dict.
    """

    code: str
    values: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The reason as JSON holds it."""
        return {"code": str(self.code), "values": dict(self.values)}

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Reason:
        """The reason that `as_dict` made."""
        return cls(content["code"], content.get("values", {}))


def reason(code: Code, **values: Any) -> Reason:
    """Makes a reason of a code and its values; a nested reason is stored as a dict."""
    return Reason(
        code,
        {k: v.as_dict() if isinstance(v, Reason) else v for k, v in values.items()},
    )
