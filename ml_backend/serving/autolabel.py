"""Predicts every task that nobody has annotated, and imports the predictions.

A prediction holds whatever becomes of the job: killed at any moment, the job goes on after the last
page whose import is known, and Label Studio is asked again before each import, so that no task gets
two predictions of one version. The tasks of a large project are given to shards, which several
workers take.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

from sqlalchemy import select

from ml_backend.acquisition.cold_start import cold_start
from ml_backend.jobs.outcomes import Done, Failed, Refused
from ml_backend.jobs.payloads import AutolabelCheckpoint, ShardPayload
from ml_backend.jobs.requests import FIRST_TASKS, tasks_arrived
from ml_backend.label_studio.client import LabelStudioClient
from ml_backend.label_studio.label_config import LabelConfig
from ml_backend.reasons import Code, Reason, reason
from ml_backend.serving.job_parts import AT_ONCE, PATIENCE, PredictionParts
from ml_backend.serving.stale_predictions import older_versions
from ml_backend.store.states import JobState
from ml_backend.store.tables import UNTRAINED, Job, Project

_PAGES = 20
"""Pages of a small project: so often its progress is saved, and another live version noticed."""
_SMALLEST_PAGE = 20
_LARGEST_PAGE = 1000


class AutoLabel:
    """Predicts for the tasks of a project and imports the predictions over the API.

    Args:
        parts: what the job works with.
    """

    def __init__(self, parts: PredictionParts) -> None:
        self._parts = parts

    def run(self, job: Job) -> Done:
        """Does a claimed auto-labelling, from where it was left; gives a large one to shards.

        Raises:
            Refused: there is no token, no label to detect, or no version.
            Failed: the version cannot be loaded, or no image can be read.
            TakenOver: another run has the job.
            LabelStudioError: Label Studio could not do what was asked; imported predictions stay.
        """
        project = self._parts.project(job.project_id)
        client, config = self._parts.client_and_config(project)
        version = project.live_version
        if version is None:
            try:
                version = self._parts.pretrained_version(project)
            except Refused:
                return self._choose_first_tasks(job, project, client, config)
        run = _Run(self._parts, job, project, client, config, version)
        if not run.reached.sharded:
            shards = self._shards(project, client, version, run.reached)
            if shards:
                run.reached.sharded = True
                # After the shards, the tasks that have arrived meanwhile are left.
                run.reached.cursor = shards[-1]["upto"]
                run.reached.newest_task = run.look()[1]
                return Done(
                    reason(Code.SHARDS_RUN, done=0, total=len(shards)),
                    version,
                    {"shards": shards, "checkpoint": run.reached.stored()},
                )
        return run.label()

    def run_shard(self, job: Job) -> Done:
        """Does a claimed shard of an auto-labelling, from where it was left.

        Raises:
            Refused, Failed, TakenOver, LabelStudioError: as `run`.
        """
        part = ShardPayload.model_validate(job.payload)
        project = self._parts.project(job.project_id)
        client, config = self._parts.client_and_config(project)
        if part.version != (project.live_version or part.version):
            return Done(
                reason(Code.SUPERSEDED, version=project.live_version, done=0, total=part.tasks),
                part.version,
            )
        return _Run(self._parts, job, project, client, config, part.version, part).label()

    def _shards(
        self,
        project: Project,
        client: LabelStudioClient,
        version: str,
        reached: AutolabelCheckpoint,
    ) -> list[dict[str, Any]]:
        """Parts of a large project's tasks, by id; none where one run is enough."""
        size = self._parts.settings.auto_label_shard
        number, cursor = project.label_studio_id, reached.cursor
        _, left = client.unpredicted_tasks(number, version, after=cursor, limit=1)
        if left <= 2 * size:
            return []
        shards = []
        for begin in range(0, left, size):
            tasks = min(size, left - begin)
            # Where tasks have gone meanwhile, the job itself predicts those after the last shard.
            upto = client.unpredicted_task_id(
                number, version, after=reached.cursor, position=begin + tasks
            )
            if upto is None:
                break
            shards.append(
                ShardPayload(version=version, after=cursor, upto=upto, tasks=tasks).stored()
            )
            cursor = upto
        return shards

    def _choose_first_tasks(
        self, job: Job, project: Project, client: LabelStudioClient, config: LabelConfig
    ) -> Done:
        """Before any model: imports predictions without a box, whose scores say where to begin."""
        reached = _reached(job, UNTRAINED)

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

        _, reached.newest_task = _look(self._parts, project.id, reached.newest_task)
        chosen = cold_start(
            self._parts.settings,
            config,
            self._parts.label_studios.images(project),
            pages(),
            max(1, FIRST_TASKS - reached.imported),
            self._parts.report.progress,
        )
        if _look(self._parts, project.id, 0)[0] is not None:
            return Done(reason(Code.SUPERSEDED, version=None, done=0, total=0), UNTRAINED)
        self._parts.report.check()
        # A task that was opened meanwhile holds none: untrained, nothing is answered.
        reached.imported += client.import_predictions(project.label_studio_id, chosen)
        reached.done = reached.imported
        why = reason(Code.TASKS_CHOSEN, tasks=len(chosen))
        self._parts.report.checkpoint(1.0, why, reached.stored(), UNTRAINED)
        return Done(why, UNTRAINED)


class _Run:
    """One run over the tasks of a project, or over a shard's part of them."""

    def __init__(
        self,
        parts: PredictionParts,
        job: Job,
        project: Project,
        client: LabelStudioClient,
        config: LabelConfig,
        version: str,
        part: ShardPayload | None = None,
    ) -> None:
        self._parts = parts
        self._job = job
        self._project = project
        self._client = client
        self._config = config
        self._version = version
        self._part = part
        self._speed = _Speed()
        self._total = 0
        self.reached = _reached(job, version)
        if part is not None:
            self.reached.cursor = max(self.reached.cursor, part.after)

    def look(self) -> tuple[str | None, int]:
        """The live version, and the row of the newest task."""
        return _look(self._parts, self._project.id, self.reached.newest_task)

    def label(self) -> Done:
        """Predicts page after page."""
        reached = self.reached
        while True:
            live, newest_task = self.look()
            tasks = self._page()
            if live != self._project.live_version:
                why = reason(Code.SUPERSEDED, version=live, done=reached.done, total=self._total)
                return Done(why, self._version)
            reached.newest_task = newest_task
            if not tasks:
                break
            results = self._predict(tasks)
            if results is None:
                continue
            self._import(tasks, results)
            reached.done += len(tasks)
            reached.cursor = int(tasks[-1]["id"])
            self._save()
        return self._end()

    def _page(self) -> list[dict[str, Any]]:
        """The next tasks without a prediction of the version."""
        reached = self.reached
        limit = min(max(_SMALLEST_PAGE, self._total // _PAGES), _LARGEST_PAGE)
        tasks, left = self._client.unpredicted_tasks(
            self._project.label_studio_id, self._version, after=reached.cursor, limit=limit
        )
        if self._part is None:
            self._total = reached.done + left
            return list(tasks)
        mine = [task for task in tasks if int(task["id"]) <= self._part.upto]
        self._total = max(reached.done + len(mine), self._part.tasks)
        return mine

    def _predict(self, tasks: Sequence[dict[str, Any]]) -> list[dict[str, Any] | None] | None:
        """The predictions of a page; None where another version has gone live meanwhile."""
        results: list[dict[str, Any] | None] = []
        for start in range(0, len(tasks), AT_ONCE):
            if start:
                done = self.reached.done + start
                why = self._speed.reason(done, self._total)
                self._parts.report.progress(done / self._total, why)
            predicted = self._parts.serving().predict(
                self._project,
                self._config,
                tasks[start : start + AT_ONCE],
                deadline=time.monotonic() + PATIENCE,
            )
            if predicted.version != self._version:
                if self.look()[0] != self._project.live_version:
                    return None
                raise Failed(
                    reason(
                        Code.VERSION_UNLOADABLE,
                        version=self._version,
                        instead=predicted.version,
                    )
                )
            results += predicted.results
        return results

    def _import(
        self,
        tasks: Sequence[dict[str, Any]],
        results: Sequence[dict[str, Any] | None],
    ) -> None:
        # Asked again, because meanwhile some tasks were annotated or deleted, and others were
        # opened, which made Label Studio ask for their predictions itself; so did a run that was
        # killed between its import and its note of it.
        missing, _ = self._client.unpredicted_tasks(
            self._project.label_studio_id,
            self._version,
            after=self.reached.cursor,
            limit=len(tasks),
        )
        wanted = {task["id"] for task in missing}
        predictions: list[dict[str, Any]] = []
        for task, result in zip(tasks, results, strict=True):
            if task["id"] not in wanted:
                continue
            if result is not None:
                predictions.append({"task": task["id"], **result})
                continue
            self.reached.left_out += 1
            self.reached.example = self.reached.example or self._parts.why_not(
                self._project, self._config, task
            )
        self._parts.report.check()
        self.reached.imported += self._client.import_predictions(
            self._project.label_studio_id, predictions
        )

    def _end(self) -> Done:
        if self.reached.done:
            self._save()
        reached = self._with_shards() if self.reached.sharded else self.reached
        left_out = {"left_out": reached.left_out, "example": reached.example}
        if reached.left_out and not reached.imported:
            raise Failed(reason(Code.NO_TASK_PREDICTED, **left_out))
        if not reached.done:
            why = reason(Code.NOTHING_TO_PREDICT, version=self._version)
        else:
            why = reason(
                Code.TASKS_PREDICTED,
                imported=reached.imported,
                done=reached.done,
                version=self._version,
                **left_out,
            )
        result = None if self._part is not None else {"stale": self._stale()}
        return Done(why, self._version, result)

    def _with_shards(self) -> AutolabelCheckpoint:
        """The work of this run and of the shards together.

        Raises:
            Failed: a shard did not do its part; its reason says why.
        """
        whole = self.reached.model_copy()
        with self._parts.database.reading() as session:
            shards = session.scalars(select(Job).where(Job.parent_id == self._job.id)).all()
        for shard in shards:
            # Shards of a version that was live when the job began are no part of this one's work. A
            # shard that failed before its first checkpoint names the version in its row only.
            if shard.version != self._version:
                continue
            part = AutolabelCheckpoint.model_validate(shard.checkpoint)
            if shard.state != JobState.DONE and shard.reason.code != Code.NO_TASK_PREDICTED:
                raise Failed(shard.reason)
            whole.done += part.done
            whole.imported += part.imported
            whole.left_out += part.left_out
            whole.example = whole.example or part.example
        return whole

    def _stale(self) -> list[str] | None:
        """Older versions that Label Studio holds predictions of; None where nothing is to be
        removed."""
        with self._parts.database.reading() as session:
            ours = older_versions(session, self._project.id, self._version)
        held = self._client.prediction_counts(self._project.label_studio_id)
        older = [name for name in ours if held.get(name)]
        return older if older or self.reached.imported or self.reached.sharded else None

    def _save(self) -> None:
        self._parts.report.checkpoint(
            self.reached.done / max(1, self._total),
            self._speed.reason(self.reached.done, self._total),
            self.reached.stored(),
            self._version,
        )


def _reached(job: Job, version: str) -> AutolabelCheckpoint:
    """How far a job is; all begins anew where it was begun with another version."""
    reached = AutolabelCheckpoint.model_validate(job.checkpoint)
    if reached.version == version:
        return reached
    return AutolabelCheckpoint(version=version, newest_task=reached.newest_task)


def _look(parts: PredictionParts, project_id: int, newest: int) -> tuple[str | None, int]:
    with parts.database.reading() as session:
        live = session.get_one(Project, project_id).live_version
        return live, tasks_arrived(session, project_id, newest) or newest


class _Speed:
    """Tells how fast a run is, measured from the first time that it is asked: loading a model takes
    longer than some of the tasks."""

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None

    def reason(self, done: int, total: int) -> Reason:
        """How far the run is, how fast, and how many seconds are left."""
        moment = time.monotonic()
        before, began = self._first = self._first or (done, moment)
        values: dict[str, Any] = {"done": done, "total": total}
        if done not in (before, total) and moment > began:
            rate = (done - before) / (moment - began)
            values |= {"rate": rate, "seconds_left": (total - done) / rate}
        return reason(Code.LABELLING, **values)
