"""Predicts for tasks: fetches and decodes images in parallel while the model runs."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import numpy as np

from ml_backend.acquisition.control_group import is_control
from ml_backend.detection.costs import shown
from ml_backend.detection.decoding import UndecodableImage
from ml_backend.detection.types import Detections
from ml_backend.label_studio.controls.base import Control
from ml_backend.label_studio.images import ImageSource, ImageUnavailable
from ml_backend.label_studio.label_config import LabelConfig, match_labels
from ml_backend.label_studio.media import read_image
from ml_backend.projects.clients import Clients
from ml_backend.remedies import with_remedy
from ml_backend.serving.counters import IMAGE_FAILURES, PREDICTED
from ml_backend.serving.model_cache import LoadedModel, ModelCache
from ml_backend.settings import Settings
from ml_backend.store.tables import Project

_log = logging.getLogger(__name__)

WINDOW = 12
"""Images of one request in work at a time, so that a large request does not delay a small one."""
POOL = 48

TaskPrediction = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Predicted:
    """Holds the answer to a request for predictions.

    Attributes:
        results: for each task, in order, a prediction as Label Studio takes it; None for a task
            whose image cannot be had, or that was not done in time.
        unfinished: indices of the tasks that were not done in time.
        version: the model version that predicted.
    """

    results: list[TaskPrediction | None]
    unfinished: list[int]
    version: str


@dataclass(frozen=True, slots=True)
class _Found:
    """Holds the regions that are shown for a task, and the candidates of each of its images."""

    regions: list[dict[str, Any]]
    images: list[Detections]


class Serving:
    """Predicts for the tasks of any project."""

    def __init__(self, settings: Settings, models: ModelCache, label_studios: Clients) -> None:
        self._settings = settings
        self._models = models
        self._label_studios = label_studios
        self._pool = ThreadPoolExecutor(POOL, thread_name_prefix="predict")
        self._told: dict[int, LabelConfig] = {}

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
        with self._models.using(project) as model:
            if model is None:
                return Predicted([None] * len(tasks), [], self._models.version(project))
            return self._predict(model, project, config, tasks, deadline)

    def _predict(
        self,
        model: LoadedModel,
        project: Project,
        config: LabelConfig,
        tasks: Sequence[dict[str, Any]],
        deadline: float,
    ) -> Predicted:
        results: list[TaskPrediction | None] = [None] * len(tasks)
        if model.generic and self._told.get(project.id) != config:
            # Once for each label config, not for each task that is opened.
            self._told[project.id] = config
            words = match_labels(config, model.labels).in_words("COCO's weights")
            _log.info("project %s, before its first training: %s", project.key, words)
        images = self._label_studios.images(project)
        found: list[_Found | None] = [None] * len(tasks)
        running: dict[Future[_Found | None], int] = {}
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
                # The work on a task may outlast the deadline, and needs the model until its end.
                model.acquire()
                job.add_done_callback(lambda _: model.release())
                running[job] = index
            left = deadline - time.monotonic()
            if left <= 0:
                unfinished = sorted([*running.values(), *waiting])
                for job in running:
                    job.cancel()
                break
            done, _ = wait(running, timeout=left, return_when=FIRST_COMPLETED)
            for job in done:
                found[running.pop(job)] = job.result()
        self._score(model, tasks, found, results)
        PREDICTED.inc(sum(r is not None for r in results))
        return Predicted(results, unfinished, model.version)

    def _one(
        self,
        model: LoadedModel,
        images: ImageSource,
        config: LabelConfig,
        task: dict[str, Any],
    ) -> _Found | None:
        """Predicts one task; logs the cause and returns None where it has no prediction."""
        regions: list[dict[str, Any]] = []
        images_of_task: list[Detections] = []
        number = task.get("id")
        for controls in config.controls_by_image().values():
            try:
                image = read_image(
                    images, task, controls[0], max_pixels=self._settings.image_max_pixels
                )
            except (ImageUnavailable, UndecodableImage) as error:
                IMAGE_FAILURES.labels(type(error).__name__).inc()
                _log.warning("task %s gets no prediction: %s", number, with_remedy(error))
                return None
            except Exception:
                # As below: an unexpected error with one image must not fail the other tasks.
                IMAGE_FAILURES.labels("unexpected").inc()
                _log.exception("task %s gets no prediction: its image could not be read", number)
                return None
            try:
                asked = model.predictor.submit(image)
                width, height = image.size
                # The decoded image may be large, and other images may wait before it.
                del image
                candidates = asked.result()
            except Exception:
                # An error of the model with one image must not fail the other tasks.
                IMAGE_FAILURES.labels("model").inc()
                _log.exception("task %s gets no prediction: the model failed on it", number)
                return None
            images_of_task.append(candidates)
            regions += _regions(model, config, controls, candidates, width, height)
        in_control = isinstance(number, int) and is_control(number, self._settings.blind_share)
        return _Found([] if in_control else regions, images_of_task)

    @staticmethod
    def _score(
        model: LoadedModel,
        tasks: Sequence[dict[str, Any]],
        found: Sequence[_Found | None],
        results: list[TaskPrediction | None],
    ) -> None:
        """Fills in the results; a task of several images gets the lowest of their scores."""
        images = [(i, image) for i, f in enumerate(found) if f is not None for image in f.images]
        numbers = [tasks[i].get("id") for i, _ in images]
        scores = model.strategy.score(numbers, [image for _, image in images])
        lowest: dict[int, float] = {}
        for (i, _), score in zip(images, scores, strict=True):
            lowest[i] = min(score, lowest.get(i, 1.0))
        for i, one in enumerate(found):
            if one is not None:
                results[i] = {
                    "result": one.regions,
                    "score": lowest.get(i, 1.0),
                    "model_version": model.version,
                }


def _regions(
    model: LoadedModel,
    config: LabelConfig,
    controls: Sequence[Control],
    candidates: Detections,
    width: int,
    height: int,
) -> list[dict[str, Any]]:
    """Writes the boxes that are shown, each by the first control that has its label."""
    names = _names(model, config)
    learned = np.array([model.thresholds.get(label, np.inf) for label in model.labels])
    by_label = np.full(len(model.labels), np.inf)
    drawn_by: dict[int, Control] = {}
    for index, name in enumerate(names):
        control = next((c for c in controls if name in {o.output for o in c.labels}), None)
        if control is None or not np.isfinite(learned[index]):
            continue
        drawn_by[index] = control
        # A threshold of the label config replaces the learned one.
        own = control.score_threshold
        by_label[index] = learned[index] if own is None else own
    kept = shown(candidates, by_label[candidates.labels])
    result: list[dict[str, Any]] = []
    for control in controls:
        mine = [i for i, drawer in drawn_by.items() if drawer is control]
        chosen = kept.where(np.isin(kept.labels, mine))
        result += control.write_regions(
            chosen, [names[i] or "" for i in chosen.labels.tolist()], width, height
        )
    return result


def _names(model: LoadedModel, config: LabelConfig) -> list[str | None]:
    """Maps each of the model's labels to the project's; None where the project has none."""
    if not model.generic:
        known = set(config.labels)
        return [label if label in known else None for label in model.labels]
    matched = match_labels(config, model.labels).matched
    by_class = {known: label for label, classes in matched.items() for known in classes}
    return [by_class.get(label) for label in model.labels]
