"""Chooses the first tasks of a project that has no model version yet, for diversity alone.

Label Studio orders tasks by the scores of predictions. A project without a version therefore gets
predictions without regions, of the version `untrained`, whose scores order its most different
images.
"""

from __future__ import annotations

import heapq
import logging
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from ml_backend.acquisition.farthest_first import farthest_first
from ml_backend.acquisition.stable_random import chance
from ml_backend.detection.decoding import UndecodableImage, decode_image
from ml_backend.detection.detector import Detector
from ml_backend.detection.device import resolve_device
from ml_backend.detection.presets import preset_named
from ml_backend.detection.types import FloatArray
from ml_backend.label_studio.images import ImageSource, ImageUnavailable
from ml_backend.label_studio.label_config import LabelConfig
from ml_backend.label_studio.media import fetch_media
from ml_backend.reasons import Code, Reason, reason
from ml_backend.remedies import with_remedy
from ml_backend.settings import Settings
from ml_backend.store.tables import UNTRAINED

_log = logging.getLogger(__name__)

POOL = 1000
"""Tasks, drawn at random, among which the first ones are chosen."""
_FETCHERS = 8


def cold_start(
    settings: Settings,
    config: LabelConfig,
    images: ImageSource,
    tasks: Iterable[dict[str, Any]],
    count: int,
    on_progress: Callable[[float, Reason], None],
) -> list[dict[str, Any]]:
    """Chooses the tasks to annotate first; see `farthest_first`.

    Args:
        settings: preset, weights and device, and the limits of images.
        config: the project's label config; of several images of a task the first counts.
        images: source of the project's images.
        tasks: all tasks, with `id` and `data`; iterated once.
        count: number of tasks wanted.
        on_progress: receives the fraction done, in `[0, 1]`, and how far that is.

    Returns:
        For each chosen task a prediction to import, without a region: `task`, `result`, `score`
        from 0 for the first one, and `model_version`. Tasks whose image cannot be read are left
        out, and a warning is logged for each.

    Raises:
        DeviceError, ValueError: the device, the preset or the weights cannot be used.
    """
    drawn = heapq.nsmallest(POOL, tasks, key=lambda task: chance(f"cold start:{task['id']}"))
    device = resolve_device(settings.device)
    preset = preset_named(settings.preset, device)
    trunk = Detector.pretrained(preset, config.labels, settings.weights, device)
    control = config.controls[0]
    numbers: list[int] = []
    rows: list[FloatArray] = []

    def fetch(task: dict[str, Any]) -> bytes | None:
        try:
            return fetch_media(images, task, control)
        except ImageUnavailable as error:
            _log.warning("task %s cannot be among the first tasks: %s", task["id"], error)
            return None

    with ThreadPoolExecutor(_FETCHERS, thread_name_prefix="images") as pool:
        for done, (task, content) in enumerate(zip(drawn, pool.map(fetch, drawn), strict=True)):
            if content is None:
                continue
            try:
                image = decode_image(content, max_pixels=settings.image_max_pixels)
            except UndecodableImage as error:
                _log.warning(
                    "task %s cannot be among the first tasks: %s", task["id"], with_remedy(error)
                )
                continue
            (found,) = trunk.predict([image])
            if found.embedding is not None:
                numbers.append(task["id"])
                rows.append(found.embedding)
            on_progress(done / len(drawn), reason(Code.CHOOSING, done=done + 1, total=len(drawn)))
    chosen = farthest_first(np.stack(rows), count) if rows else []
    return [
        {
            "task": numbers[i],
            "result": [],
            "score": place / max(1, len(chosen)),
            "model_version": UNTRAINED,
        }
        for place, i in enumerate(chosen)
    ]
