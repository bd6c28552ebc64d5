"""Words why a training made no version."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ml_backend.reasons import Code


def _too_few_images(v: Mapping[str, Any]) -> str:
    said = f"refused because only {v['images']} annotated images can be read"
    example = v.get("example")
    return said + (f"; for example: {example}" if example else ": annotate some and ask again")


WORDS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    Code.LABEL_CONFIG_UNUSABLE: lambda v: f"refused because of the label config: {v['detail']}",
    Code.SETTING_WRONG: lambda v: f"refused because of a setting: {v['detail']}",
    Code.FILE_ERROR: lambda v: (
        f"the training could not write or read a file: {v['detail']}"
        if v.get("kind") == "train"
        else f"a file could not be written or read: {v['detail']}"
    ),
    Code.DIVERGED: lambda v: f"failed: {v['detail']}",
    Code.TOO_FEW_IMAGES: _too_few_images,
    Code.ONE_TASK_ONLY: lambda v: (
        "refused because all images are one task's, and nothing is left to measure on: annotate "
        "another one and ask again"
    ),
    Code.TRAINED_IS_LIVE: lambda v: "refused because a trained version is live",
    Code.NO_BOXES: lambda v: (
        "refused because no annotation holds a box of the label config's labels"
    ),
}
