"""Labels the rest: every task without an annotation gets a prediction of the live version.

Tasks are read a page at a time, in the order of their ids; how far a job came is saved after each
page, so that it goes on there whatever ends its process. Runs in a process of its own
(`supervisor`).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ml_backend.acquisition.cold_start import cold_start
from ml_backend.detection.decoding import UndecodableImage, decode_image
from ml_backend.jobs.jobs import FIRST_TASKS, Jobs, tasks_arrived
from ml_backend.label_studio.client import LabelStudioClient
from ml_backend.label_studio.images import ImageUnavailable
from ml_backend.label_studio.label_config import (
    LabelConfig,
    LabelConfigError,
    parse_label_config,
)
from ml_backend.projects.clients import LabelStudios
from ml_backend.remedies import with_remedy
from ml_backend.serving.stale_predictions import older_versions
from ml_backend.settings import Settings
from ml_backend.store.database import Database
from ml_backend.store.tables import PRETRAINED, UNTRAINED, Job, Project

if TYPE_CHECKING:
    from ml_backend.serving.predictions import Serving

_PAGES = 20
"""Pages of a small project: so often its progress is saved, and another live version noticed."""
_SMALLEST_PAGE = 20
_LARGEST_PAGE = 1000
AT_ONCE = 100
PATIENCE = 600.0
"""Seconds that the images of one request to the model may take."""
_LOADING = 60.0
"""Seconds that COCO's weights may take to load."""


class AutoLabelRefused(Exception):
    """It cannot be done as things are; the text says why, and what to do."""


class AutoLabelFailed(Exception):
    """It should have been possible; the text says what is wrong."""


@dataclass(frozen=True, slots=True)
class Labelled:
    """What a run did.

    Attributes:
        version: whose predictions were imported.
        reason: what came of it, in words.
    """

    version: str
    reason: str


@dataclass(slots=True)
class _SoFar:
    """How far a job is, as its payload keeps it.

    Attributes:
        version: whose predictions it imports.
        cursor: Label Studio's id of the last task that was dealt with.
        done: tasks dealt with.
        imported: predictions imported.
        left_out: tasks without a prediction, because an image cannot be had.
        example: why the first of them was left out.
        newest_task: row of the newest task that it knew of.
    """

    version: str
    cursor: int = 0
    done: int = 0
    imported: int = 0
    left_out: int = 0
    example: str = ""
    newest_task: int = 0

    @classmethod
    def of(cls, payload: dict[str, Any], version: str) -> _SoFar:
        """What a payload says; all begins anew where it is of another version."""
        if payload.get("version") == version:
            return cls(**payload)
        return cls(version, newest_task=payload.get("newest_task", 0))


class AutoLabel:
    """Predicts for the tasks of a project and imports the predictions over the API.

    Args:
        settings: limits of images.
        database: which version is live.
        jobs: where progress is saved.
        label_studios: where tasks are read and predictions go.
        serving: predicts; called when there is something to predict.
        version_of: the version that a prediction made now would carry.
    """

    def __init__(
        self,
        settings: Settings,
        database: Database,
        jobs: Jobs,
        label_studios: LabelStudios,
        serving: Callable[[], Serving],
        version_of: Callable[[Project], str],
    ) -> None:
        self._settings = settings
        self._database = database
        self._jobs = jobs
        self._label_studios = label_studios
        self._serving = serving
        self._version_of = version_of

    def run(self, job: Job) -> Labelled:
        """Does a claimed job, from where it was left.

        Raises:
            AutoLabelRefused: there is no token, no label to detect, or no version.
            AutoLabelFailed: the version cannot be loaded, or no image can be read.
            TakenOver: another run has the job.
            LabelStudioError: Label Studio could not do what was asked; what is imported stays.
        """
        with self._database.reading() as session:
            project = session.get_one(Project, job.project_id)
        client, config = what_is_needed(project, self._label_studios)
        version = project.live_version
        if version is None:
            try:
                version = before_the_first(project, self._settings, self._version_of)
            except AutoLabelRefused:
                return self._choose_the_first(job, project, client, config)
        return self._label(job, project, client, config, version)

    def _choose_the_first(
        self, job: Job, project: Project, client: LabelStudioClient, config: LabelConfig
    ) -> Labelled:
        """Before any model: predictions without a box, whose scores say where to begin."""
        so_far = _SoFar.of(job.payload, UNTRAINED)

        def pages() -> Iterator[dict[str, Any]]:
            cursor = 0
            while True:
                tasks, _ = client.unpredicted_tasks(
                    project.label_studio_id, UNTRAINED, after=cursor, limit=_LARGEST_PAGE
                )
                if not tasks:
                    return
                yield from tasks
                cursor = int(tasks[-1]["id"])

        _, so_far.newest_task = self._look(project.id, so_far.newest_task)
        chosen = cold_start(
            self._settings,
            config,
            self._label_studios.images(project),
            pages(),
            max(1, FIRST_TASKS - so_far.imported),
            lambda fraction, words: self._jobs.progress(job.id, fraction, words),
        )
        if self._look(project.id, 0)[0] is not None:
            return Labelled(UNTRAINED, "superseded by the first version")
        self._jobs.hold(job)
        # One that was opened meanwhile holds none: untrained, nothing is answered.
        so_far.imported += client.import_predictions(project.label_studio_id, chosen)
        so_far.done = so_far.imported
        words = f"{len(chosen)} tasks chosen to begin with, for how they differ"
        self._jobs.advance(job, 1.0, words, payload=dataclasses.asdict(so_far), version=UNTRAINED)
        return Labelled(UNTRAINED, words)

    def _label(
        self,
        job: Job,
        project: Project,
        client: LabelStudioClient,
        config: LabelConfig,
        version: str,
    ) -> Labelled:
        so_far = _SoFar.of(job.payload, version)
        clock = _Clock()
        total = 0
        while True:
            live, newest_task = self._look(project.id, so_far.newest_task)
            limit = min(max(_SMALLEST_PAGE, total // _PAGES), _LARGEST_PAGE)
            tasks, left = client.unpredicted_tasks(
                project.label_studio_id, version, after=so_far.cursor, limit=limit
            )
            total = so_far.done + left
            if live != project.live_version:
                return Labelled(
                    version, f"superseded by {live} at {so_far.done:,} of {total:,} tasks"
                )
            so_far.newest_task = newest_task
            if not tasks:
                break
            results = self._predict(job, project, config, tasks, so_far, total, clock)
            if results is None:
                continue
            self._import(job, project, client, config, tasks, results, so_far)
            so_far.done += len(tasks)
            so_far.cursor = int(tasks[-1]["id"])
            self._save(job, so_far, total, clock)
        return self._end(job, project, client, so_far, total, clock)

    def _predict(
        self,
        job: Job,
        project: Project,
        config: LabelConfig,
        tasks: Sequence[dict[str, Any]],
        so_far: _SoFar,
        total: int,
        clock: _Clock,
    ) -> list[dict[str, Any] | None] | None:
        """The predictions of a page; None where another version has gone live meanwhile."""
        results: list[dict[str, Any] | None] = []
        for start in range(0, len(tasks), AT_ONCE):
            if start:
                done = so_far.done + start
                self._jobs.progress(job.id, done / total, clock.words(done, total))
            predicted = self._serving().predict(
                project,
                config,
                tasks[start : start + AT_ONCE],
                deadline=time.monotonic() + PATIENCE,
            )
            if predicted.version != so_far.version:
                if self._look(project.id, 0)[0] != project.live_version:
                    return None
                raise AutoLabelFailed(
                    f"{so_far.version} cannot be loaded ({predicted.version} predicts in its "
                    "place): the log says why"
                )
            results += predicted.results
        return results

    def _import(
        self,
        job: Job,
        project: Project,
        client: LabelStudioClient,
        config: LabelConfig,
        tasks: Sequence[dict[str, Any]],
        results: Sequence[dict[str, Any] | None],
        so_far: _SoFar,
    ) -> None:
        # Asked again, because meanwhile some were annotated or deleted, and others were opened,
        # which made Label Studio ask for their predictions itself; so did a run that was killed
        # between its import and its note of it.
        missing, _ = client.unpredicted_tasks(
            project.label_studio_id, so_far.version, after=so_far.cursor, limit=len(tasks)
        )
        wanted = {task["id"] for task in missing}
        predictions: list[dict[str, Any]] = []
        for task, result in zip(tasks, results, strict=True):
            if task["id"] not in wanted:
                continue
            if result is not None:
                predictions.append({"task": task["id"], **result})
                continue
            so_far.left_out += 1
            so_far.example = so_far.example or why_not(
                project, config, task, self._settings, self._label_studios
            )
        self._jobs.hold(job)
        so_far.imported += client.import_predictions(project.label_studio_id, predictions)

    def _end(
        self,
        job: Job,
        project: Project,
        client: LabelStudioClient,
        so_far: _SoFar,
        total: int,
        clock: _Clock,
    ) -> Labelled:
        left_out = ""
        if so_far.left_out:
            left_out = f"; {so_far.left_out:,} left out, for example {so_far.example}"
        if so_far.left_out and not so_far.imported:
            raise AutoLabelFailed(f"no task could be predicted{left_out}")
        if so_far.done:
            self._save(job, so_far, total, clock)
        with self._database.reading() as session:
            ours = older_versions(session, project.id, so_far.version)
        held = client.prediction_counts(project.label_studio_id)
        older = [name for name in ours if held.get(name)]
        if older or so_far.imported:
            self._jobs.plan_tidying(project.id, older)
        if not so_far.done:
            return Labelled(
                so_far.version, f"every task without an annotation has one of {so_far.version}"
            )
        return Labelled(
            so_far.version,
            f"{so_far.imported:,} of {so_far.done:,} tasks predicted by {so_far.version}{left_out}",
        )

    def _save(self, job: Job, so_far: _SoFar, total: int, clock: _Clock) -> None:
        self._jobs.advance(
            job,
            so_far.done / max(1, total),
            clock.words(so_far.done, total),
            payload=dataclasses.asdict(so_far),
            version=so_far.version,
        )

    def _look(self, project_id: int, newest: int) -> tuple[str | None, int]:
        """The live version, and the row of the newest task."""
        with self._database.reading() as session:
            live = session.get_one(Project, project_id).live_version
            return live, tasks_arrived(session, project_id, newest) or newest


def what_is_needed(
    project: Project, label_studios: LabelStudios
) -> tuple[LabelStudioClient, LabelConfig]:
    """What a project's tasks are predicted with.

    Raises:
        AutoLabelRefused: there is no token, or no label to detect.
    """
    client = label_studios.client(project)
    if client is None:
        raise AutoLabelRefused(
            "refused because predictions cannot be imported without a token: set "
            "LABEL_STUDIO_URL and LABEL_STUDIO_API_KEY"
        )
    try:
        return client, parse_label_config(project.label_config)
    except LabelConfigError as error:
        raise AutoLabelRefused(f"refused because of the label config: {error}") from error


def before_the_first(
    project: Project, settings: Settings, version_of: Callable[[Project], str]
) -> str:
    """The version of a project before its first training: COCO's, waited for while it loads.

    Raises:
        AutoLabelRefused: COCO's weights cannot be had.
    """
    until = time.monotonic() + (0 if settings.weights == "none" else _LOADING)
    while version_of(project) != PRETRAINED:
        if time.monotonic() >= until:
            raise AutoLabelRefused(
                "refused because the project has no model version yet: annotate "
                f"{settings.train_min} tasks, and the first training makes one"
            )
        time.sleep(0.5)
    return PRETRAINED


def why_not(
    project: Project,
    config: LabelConfig,
    task: dict[str, Any],
    settings: Settings,
    label_studios: LabelStudios,
) -> str:
    """Why a task has no prediction: its images are read once more."""
    images = label_studios.images(project)
    try:
        for data_key in config.controls_by_image():
            value = task["data"].get(data_key)
            if not isinstance(value, str) or not value:
                raise ImageUnavailable(f"its data has no image under {data_key!r}")
            decode_image(images.fetch(task["id"], value), max_pixels=settings.image_max_pixels)
    except (ImageUnavailable, UndecodableImage) as error:
        return f"task {task['id']}: {with_remedy(error)}"
    return f"task {task['id']}: the log says why"


class _Clock:
    """Says how fast a run is, measured from the first time that it is asked: loading a model takes
    longer than some of the tasks."""

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None

    def words(self, done: int, total: int) -> str:
        """How far it is, how fast, and when it will be done."""
        words = f"{done:,} of {total:,} tasks"
        moment = time.monotonic()
        before, began = self._first = self._first or (done, moment)
        if done in (before, total) or moment == began:
            return words
        rate = (done - before) / (moment - began)
        return f"{words}, {rate:.1f}/s, about {_duration((total - done) / rate)} left"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
