"""Names the kinds and states that the tables hold; each member equals its stored text."""

from __future__ import annotations

from enum import StrEnum


class JobKind(StrEnum):
    """Kinds of jobs."""

    TRAIN = "train"
    LIVE_HEAD = "live_head"
    """Fit a head to the first annotations within seconds."""
    AUTOLABEL = "autolabel"
    """Predict every task without an annotation."""
    AUTOLABEL_SHARD = "autolabel_shard"
    """One part of the auto-labelling of a large project."""
    PREDICT = "predict"
    """Predict the tasks that a request for predictions did not finish."""
    REMOVE_STALE = "remove_stale"
    """Remove the predictions of versions that are no longer live."""


class JobState(StrEnum):
    """States of a job."""

    WAITING = "waiting"
    """For annotations, for a quiet time, or for the shards of an auto-labelling."""
    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    """Something is wrong that another attempt would not mend."""
    REFUSED = "refused"
    """The job cannot be done as things are; its reason says what to change."""


ACTIVE = (JobState.WAITING, JobState.QUEUED, JobState.RUNNING)
"""States of a job that has not ended."""


class Trigger(StrEnum):
    """What asked for a job."""

    WEBHOOK = "webhook"
    BUTTON = "button"
    COMMAND = "command"
    PREDICT = "predict"
    PROMOTION = "promotion"
    TASKS = "tasks"
    AUTOLABEL = "autolabel"


class VersionState(StrEnum):
    """States of a model version."""

    LIVE = "live"
    RETIRED = "retired"
    """Was live, and gave way to a later version."""
    REJECTED = "rejected"
    ROLLED_BACK = "rolled back"
    """Was live, and somebody went back to another version."""
    PRUNED = "pruned"
    """Its artefact was deleted to make room."""
