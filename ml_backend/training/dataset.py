"""Makes the samples of a training from stored annotations.

Rules:
    - Skipped (`was_cancelled`) and deleted annotations, and those of deleted tasks, are left out.
    - Of several annotations of a task one counts: the ground truth, or else the newest.
    - An annotation without a region is a true negative.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

import numpy as np
from sqlalchemy import String, or_, select
from sqlalchemy import cast as sql_cast

from ml_backend.acquisition.random_share import in_random_share
from ml_backend.detection.decoding import ReducedImage, UndecodableImage, decode_reduced
from ml_backend.detection.types import Sample
from ml_backend.label_studio.controls.base import Control
from ml_backend.label_studio.images import ImageSource, ImageUnavailable
from ml_backend.label_studio.label_config import LabelConfig
from ml_backend.label_studio.media import media_of
from ml_backend.reasons import Code, Reason, reason
from ml_backend.remedies import with_remedy
from ml_backend.store.database import Database, in_chunks
from ml_backend.store.tables import Annotation, Project, Task
from ml_backend.training.split import Item, Side, assign, fingerprint

_log = logging.getLogger(__name__)

FETCHERS = 8
_QUALITY = 95
"""JPEG quality of working copies."""

_OF_TASK = (Task.project_id == Annotation.project_id) & (Task.label_studio_id == Annotation.task_id)

_LOOKED_AT = or_(
    Annotation.lead_time.is_not(None),
    Annotation.parent_prediction.is_(None),
    sql_cast(Annotation.result, String) != "[]",
)
"""Leaves out empty annotations that were made by accepting empty predictions in bulk: nobody looked
at these images, and the tasks of the control group are shown without boxes on purpose."""


@dataclass(frozen=True, slots=True)
class Dataset:
    """Holds everything that a training of a project learns from.

    Attributes:
        labels: label names; a sample's labels are indices into it.
        samples: one for each image of each annotated task.
        task_of: task by sample key.
        clip_of: clip by sample key.
        holdout: keys of the samples that only measure.
        left_out: how often something was left out, by the reason.
        revision: revision of the project that was read.
    """

    labels: tuple[str, ...]
    samples: tuple[Sample, ...]
    task_of: dict[str, int]
    clip_of: dict[str, int]
    holdout: frozenset[str]
    revision: int
    left_out: dict[str, int] = field(default_factory=dict)

    @property
    def tasks(self) -> int:
        """The number of tasks that the samples come from."""
        return len(set(self.task_of.values()))

    def boxes_by_label(self) -> dict[str, int]:
        """Counts the boxes of each label."""
        counts: Counter[int] = Counter()
        for sample in self.samples:
            counts.update(sample.labels.tolist())
        return {label: counts[i] for i, label in enumerate(self.labels)}


def build_dataset(
    project: Project,
    config: LabelConfig,
    database: Database,
    images: ImageSource,
    folder: Path,
    *,
    max_pixels: int,
    longest_side: int | None = None,
    random_share: float,
    leave_out: bool = True,
    store_sides: Callable[[list[dict[str, Any]]], None],
    on_progress: Callable[[float, Reason], None],
) -> Dataset:
    """Reads a project's annotations and images, and decides the sides of new tasks.

    Args:
        project: whose annotations.
        config: its label config.
        database: where they are.
        images: where its images come from.
        folder: receives the image files.
        max_pixels: larger images are left out.
        longest_side: pixels of an image's longer side that a detector can use: of larger images a
            working copy of at least this length is kept, which is decoded in a fraction of the
            time. None keeps every image as it is.
        random_share: share of the tasks that are asked for by chance, in `[0, 1]`.
        leave_out: whether tasks whose images cannot be fetched are left out.
        store_sides: receives the tasks whose side was decided, for `sides.write_sides`.
        on_progress: told the fraction done and its reason; may raise to stop.

    Raises:
        ImageUnavailable: an image cannot be fetched, and `leave_out` is not set.
    """
    chosen, revision = _chosen(database, project.id)
    left_out: Counter[str] = Counter()
    images_of_task = config.controls_by_image().values()
    total = len(chosen) * len(images_of_task)
    done = 0

    def fetch(entry: tuple[Task, Annotation, tuple[Control, ...]]) -> _Fetched | str:
        nonlocal done
        task, annotation, controls = entry
        try:
            return _fetch(
                task, annotation, controls, config, images, folder, max_pixels, longest_side
            )
        except (ImageUnavailable, UndecodableImage) as error:
            if not leave_out and isinstance(error, ImageUnavailable):
                raise
            words = with_remedy(error)
            _log.warning("task %d is left out of the training: %s", task.label_studio_id, words)
            return words
        finally:
            done += 1
            if done % 10 == 0:
                on_progress(done / total, reason(Code.READING_IMAGES, done=done, total=total))

    found: list[_Fetched] = []
    with ThreadPoolExecutor(FETCHERS, thread_name_prefix="images") as pool:
        for rows in _read(database, chosen):
            wanted = [(*row, controls) for row in rows for controls in images_of_task]
            for outcome in pool.map(fetch, wanted):
                if isinstance(outcome, str):
                    left_out[outcome] += 1
                else:
                    found.append(outcome)
                    left_out.update(outcome.dropped)
    items = _sides(found, config, random_share, store_sides)
    return Dataset(
        labels=config.labels,
        samples=tuple(f.sample for f in found),
        task_of={f.sample.key: f.task for f in found},
        clip_of={f.sample.key: items[f.task].clip or f.task for f in found},
        holdout=frozenset(f.sample.key for f in found if items[f.task].side == "holdout"),
        revision=revision,
        left_out=dict(left_out),
    )


@dataclass(frozen=True, slots=True)
class _Fetched:
    """Holds what a training needs of a task's image; all regions would take gigabytes.

    Attributes:
        task: Label Studio's id.
        clip: clip of the task; None until it is known.
        side: side of the task; None until it is decided.
        name: the image's address.
        sample: what is learned from.
        fingerprint: perceptual hash of the image.
        dropped: the reasons of regions that were left out.
    """

    task: int
    clip: int | None
    side: Side | None
    name: str
    sample: Sample
    fingerprint: str
    dropped: tuple[str, ...]


def _chosen(database: Database, project_id: int) -> tuple[list[int], int]:
    """Reads the rows of the annotations that count, by task, and the project's revision."""
    with database.reading() as session:
        revision = session.get_one(Project, project_id).revision
        rows = session.execute(
            select(Task.label_studio_id, Annotation.id)
            .join(Annotation, _OF_TASK)
            .where(
                Task.project_id == project_id,
                Task.deleted_at.is_(None),
                Annotation.deleted_at.is_(None),
                Annotation.was_cancelled.is_(False),
                _LOOKED_AT,
            )
            .order_by(Task.label_studio_id, Annotation.ground_truth, Annotation.updated_at)
        )
        # The last row of each task stays: ground truth sorts after the others, newer after older.
        chosen: dict[int, int] = dict(iter(rows))
    return list(chosen.values()), revision


def _read(database: Database, chosen: Sequence[int]) -> Iterator[list[tuple[Task, Annotation]]]:
    """Yields annotations with their tasks, some at a time."""
    for numbers in in_chunks(chosen):
        with database.reading() as session:
            rows = session.execute(
                select(Task, Annotation)
                .join(Annotation, _OF_TASK)
                .where(Annotation.id.in_(numbers))
                .order_by(Task.label_studio_id)
            )
            found = [(task, annotation) for task, annotation in rows]
        yield found


def _fetch(
    task: Task,
    annotation: Annotation,
    controls: Sequence[Control],
    config: LabelConfig,
    images: ImageSource,
    folder: Path,
    max_pixels: int,
    longest_side: int | None,
) -> _Fetched:
    data_key = controls[0].data_key
    value = media_of(task.data, controls[0])
    content = images.fetch(task.label_studio_id, value)
    # The key of a task's data may contain slashes.
    path = folder / quote(f"{task.label_studio_id}-{data_key}", safe="")
    reduced = decode_reduced(content, longest=longest_side, max_pixels=max_pixels)
    _write(path, content, reduced)
    mark = task.fingerprint or fingerprint(reduced.image)
    boxes: list[list[float]] = []
    labels: list[int] = []
    dropped: list[str] = []
    size = np.array(reduced.size * 2, np.float32)
    for control in controls:
        read = control.read_regions(annotation.result)
        dropped += read.dropped
        for box in read.regions:
            boxes.append([box.x1, box.y1, box.x2, box.y2])
            labels.append(config.labels.index(box.label))
    return _Fetched(
        task=task.label_studio_id,
        clip=task.clip,
        side=cast("Side | None", task.side),
        # The address of an inline image is the image itself, and no name.
        name="" if value.startswith("data:") else value,
        sample=Sample(
            key=f"{task.label_studio_id}-{data_key}",
            image=path,
            boxes=np.array(boxes, np.float32).reshape(-1, 4) * size,
            labels=np.array(labels, np.int64),
            size=reduced.size,
        ),
        fingerprint=mark,
        dropped=tuple(dropped),
    )


def _write(path: Path, content: bytes, reduced: ReducedImage) -> None:
    """Writes the file that trainings read: the image itself, or a copy of reduced size."""
    if reduced.image.size == reduced.size:
        path.write_bytes(content)
    else:
        reduced.image.save(path, "JPEG", quality=_QUALITY, subsampling=0)


def _sides(
    found: Sequence[_Fetched],
    config: LabelConfig,
    random_share: float,
    store: Callable[[list[dict[str, Any]]], None],
) -> dict[int, Item]:
    items: dict[int, Item] = {}
    for f in found:
        names = {config.labels[i] for i in f.sample.labels.tolist()}
        if f.task in items:
            items[f.task].labels |= names
            continue
        items[f.task] = Item(
            task=f.task,
            name=f.name,
            fingerprint=f.fingerprint,
            labels=frozenset(names),
            by_chance=in_random_share(f.task, random_share),
            clip=f.clip,
            side=f.side,
        )
    # Tasks with a clip come first, so that new tasks join their clips.
    assign(sorted(items.values(), key=lambda item: (item.clip is None, item.task)))
    fresh = {f.task: items[f.task] for f in found if f.side is None}
    rows = (
        {"task": item.task, "mark": item.fingerprint, "of": item.clip, "is": item.side}
        for item in fresh.values()
    )
    # Some at a time, so that webhooks can be stored in between.
    for chunk in in_chunks(rows):
        store(chunk)
    return items
