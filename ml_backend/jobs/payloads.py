"""Payloads and checkpoints of jobs: one type for each kind.

A payload is the request, and is written once. A checkpoint is the state from which the next run
continues; it is small, and written often.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class _Stored(BaseModel):
    model_config = ConfigDict(extra="forbid")

    def stored(self) -> dict[str, Any]:
        """The fields as JSON holds them."""
        return self.model_dump(mode="json")


class TrainCheckpoint(_Stored):
    """Checkpoint of a training that waits.

    Attributes:
        enough_since: when the changes first sufficed for a training.
    """

    enough_since: datetime | None = None


class AutolabelCheckpoint(_Stored):
    """Checkpoint of an auto-labelling, or of one of its shards.

    Attributes:
        version: whose predictions are imported.
        cursor: Label Studio's id of the last task that was dealt with.
        done: tasks dealt with.
        imported: predictions imported.
        left_out: tasks without a prediction, because an image cannot be had.
        example: why the first of them was left out.
        newest_task: row of the newest task that the run knew of.
        sharded: whether the tasks were given to shards.
    """

    version: str = ""
    cursor: int = 0
    done: int = 0
    imported: int = 0
    left_out: int = 0
    example: str = ""
    newest_task: int = 0
    sharded: bool = False


class ShardPayload(_Stored):
    """The part of a project's tasks that a shard predicts.

    Attributes:
        version: whose predictions are imported.
        after: Label Studio's id of the last task before the part.
        upto: id of its last task.
        tasks: how many tasks of the part lacked a prediction when the parts were made.
    """

    version: str
    after: int
    upto: int
    tasks: int


class DeferredPayload(_Stored):
    """Tasks that a request for predictions did not finish, as Label Studio sent them."""

    tasks: list[dict[str, Any]] = Field(default_factory=list)


class DeferredCheckpoint(_Stored):
    """Checkpoint of the prediction of such tasks.

    Attributes:
        done: tasks dealt with, from the first one on.
        imported: predictions imported.
        left_out: tasks without a prediction, because an image cannot be had.
        example: why the first of them was left out.
    """

    done: int = 0
    imported: int = 0
    left_out: int = 0
    example: str = ""


class StalePayload(_Stored):
    """The versions whose predictions are removed."""

    versions: list[str] = Field(default_factory=list)
