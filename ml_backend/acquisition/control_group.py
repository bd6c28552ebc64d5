"""Which tasks are shown without boxes, so that what boxes save can be measured."""

from __future__ import annotations

from ml_backend.acquisition.stable_random import chance


def is_blind(task_id: int, share: float) -> bool:
    """Whether a task is one of those that are shown without boxes.

    A task stays what it is: its id decides, and a larger share only adds tasks.

    Args:
        task_id: Label Studio's id.
        share: of all tasks, in `[0, 1]`.
    """
    return chance(f"blind:{task_id}") < share
