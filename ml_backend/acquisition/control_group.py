"""Draws the control group: tasks shown without boxes, to measure the time that boxes save."""

from __future__ import annotations

from ml_backend.acquisition.stable_random import chance


def is_control(task_id: int, share: float) -> bool:
    """Tells whether a task belongs to the control group, which is shown without boxes.

    The id alone decides, so that a task keeps its group; a larger share only adds tasks.

    Args:
        task_id: Label Studio's id.
        share: fraction of all tasks in the control group, in `[0, 1]`.
    """
    # The prefix is older than the name of the group: another one would redraw running projects.
    return chance(f"blind:{task_id}") < share
