"""Predictions for tasks: images are fetched and decoded in parallel while the model runs."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import numpy as np

from ml_backend.detection.decoding import UndecodableImage, decode_image
from ml_backend.detection.types import Detections
from ml_backend.label_studio.images import ImageSource, ImageUnavailable
from ml_backend.label_studio.label_config import BoxControl, LabelConfig, match_labels
from ml_backend.label_studio.regions import write_regions
from ml_backend.learning.label_studios import LabelStudios
from ml_backend.learning.metrics import IMAGE_FAILURES, PREDICTED
from ml_backend.learning.models import LoadedModel, Models
from ml_backend.learning.scoring import acquisition_score
from ml_backend.settings import Settings
from ml_backend.store.tables import Project

_log = logging.getLogger(__name__)

FLOOR = 0.05
"""Confidence down to which candidates are looked at; the thresholds decide what is shown."""
WINDOW = 12
"""Images of one request in work at a time, so that a long one does not hold up a short one."""
POOL = 48

TaskPrediction = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Predicted:
    """The answer to a request for predictions.

    Attributes:
        results: for each task, in order, a prediction as Label Studio takes it; None for a task
            whose image cannot be had, or that was not done in time.
        unfinished: indices of the tasks that were not done in time.
        version: the model version that predicted.
    """

    results: list[TaskPrediction | None]
    unfinished: list[int]
    version: str


class Serving:
    """Predicts for the tasks of any project."""

    def __init__(self, settings: Settings, models: Models, label_studios: LabelStudios) -> None:
        self._settings = settings
        self._models = models
        self._label_studios = label_studios
        self._pool = ThreadPoolExecutor(POOL, thread_name_prefix="predict")

    def predict(
        self,
        project: Project,
        config: LabelConfig,
        tasks: Sequence[dict[str, Any]],
        *,
        deadline: float,
    ) -> Predicted:
        """Predicts for tasks until a deadline.

        Args:
            project: whose tasks.
            config: its label config.
            tasks: as Label Studio sends them: `id` and `data`.
            deadline: `time.monotonic()` by which the answer must be there.
        """
        results: list[TaskPrediction | None] = [None] * len(tasks)
        model = self._models.get(project)
        if model is None:
            return Predicted(results, [], self._models.version(project))
        images = self._label_studios.images(project)
        running: dict[Future[TaskPrediction | None], int] = {}
        waiting = iter(range(len(tasks)))
        unfinished: list[int] = []
        exhausted = False
        while running or not exhausted:
            while not exhausted and len(running) < WINDOW and time.monotonic() < deadline:
                index = next(waiting, None)
                if index is None:
                    exhausted = True
                    break
                job = self._pool.submit(self._one, model, images, config, tasks[index])
                running[job] = index
            left = deadline - time.monotonic()
            if left <= 0:
                unfinished = sorted([*running.values(), *waiting])
                for job in running:
                    job.cancel()
                break
            done, _ = wait(running, timeout=left, return_when=FIRST_COMPLETED)
            for job in done:
                results[running.pop(job)] = job.result()
        PREDICTED.inc(sum(r is not None for r in results))
        return Predicted(results, unfinished, model.version)

    def _one(
        self,
        model: LoadedModel,
        images: ImageSource,
        config: LabelConfig,
        task: dict[str, Any],
    ) -> TaskPrediction | None:
        """One task's prediction; None where an image of it cannot be had (it is logged why)."""
        regions: list[dict[str, Any]] = []
        scores: list[float] = []
        number = task.get("id")
        for data_key, controls in config.controls_by_image().items():
            try:
                value = task.get("data", {}).get(data_key)
                if not isinstance(value, str) or not value:
                    raise ImageUnavailable(f"its data has no image under {data_key!r}")
                content = images.fetch(number if isinstance(number, int) else None, value)
                image = decode_image(content, max_pixels=self._settings.image_max_pixels)
            except (ImageUnavailable, UndecodableImage) as error:
                IMAGE_FAILURES.labels(type(error).__name__).inc()
                _log.warning("task %s gets no prediction: %s", number, error)
                return None
            except Exception:
                # As below: a fault that one image brings to light is not the others' fault.
                IMAGE_FAILURES.labels("unexpected").inc()
                _log.exception("task %s gets no prediction: its image could not be read", number)
                return None
            try:
                candidates = model.predictor.submit(image, floor=FLOOR).result()
            except Exception:
                # Whatever one image does to the model, the others are answered.
                IMAGE_FAILURES.labels("model").inc()
                _log.exception("task %s gets no prediction: the model failed on it", number)
                return None
            scores.append(acquisition_score(candidates))
            regions += _regions(model, config, controls, candidates, image.width, image.height)
        return {
            "result": regions,
            "score": min(scores, default=1.0),
            "model_version": model.version,
        }


def _regions(
    model: LoadedModel,
    config: LabelConfig,
    controls: Sequence[BoxControl],
    candidates: Detections,
    width: int,
    height: int,
) -> list[dict[str, Any]]:
    """The boxes that are shown, each drawn by the first control that has its label."""
    result: list[dict[str, Any]] = []
    names = _names(model, config)
    drawn = np.zeros(len(candidates), bool)
    for control in controls:
        own = {label.output for label in control.labels}
        keep: list[int] = []
        for i, index in enumerate(candidates.labels.tolist()):
            name = names[index]
            if drawn[i] or name is None or name not in own:
                continue
            learned = model.thresholds.get(model.labels[index])
            threshold = control.score_threshold if learned is not None else None
            threshold = learned if threshold is None else threshold
            if threshold is not None and candidates.scores[i] >= threshold:
                keep.append(i)
        drawn[keep] = True
        chosen = candidates.where(np.isin(np.arange(len(candidates)), keep))
        result += write_regions(
            chosen.boxes,
            chosen.scores,
            [names[i] or "" for i in chosen.labels.tolist()],
            control,
            width,
            height,
        )
    return result


def _names(model: LoadedModel, config: LabelConfig) -> list[str | None]:
    """The project's label for each of the model's labels; None where the project has none."""
    if not model.generic:
        known = set(config.labels)
        return [label if label in known else None for label in model.labels]
    matched = match_labels(config, model.labels).matched
    by_class = {known: label for label, classes in matched.items() for known in classes}
    return [by_class.get(label) for label in model.labels]
