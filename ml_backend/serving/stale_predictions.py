"""Removes predictions that newer ones have replaced: ours, and nobody else's.

One at a time. Label Studio can remove all of a version in one request, but it does so in one
transaction, during which nobody can save an annotation (5 to 8 ms for each prediction), and it
then forgets the project's `model_version`, which ends pre-annotation and the order of tasks.
"""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import select
from sqlalchemy.orm import Session

from ml_backend.jobs.jobs import Jobs
from ml_backend.label_studio.client import LabelStudioClient, NotFound
from ml_backend.projects.clients import Clients
from ml_backend.store.database import Database
from ml_backend.store.tables import PRETRAINED, UNTRAINED, Job, ModelVersion, Project

_TELL_EVERY = 20


class NotYet(Exception):
    """It must wait; the text says for what.

    Attributes:
        wait: for so many seconds.
    """

    def __init__(self, why: str, wait: float) -> None:
        super().__init__(why)
        self.wait = wait


class Tidy:
    """Removes predictions of versions that are no longer live, and the second of the live one.

    Args:
        database: which version is live.
        label_studios: where the predictions are.
        settle: counts what people made of a project's predictions, while they can still be read;
            answers the seconds until it must be called again, None where all is counted.
    """

    def __init__(
        self,
        database: Database,
        label_studios: Clients,
        settle: Callable[[int], float | None],
    ) -> None:
        self._database = database
        self._label_studios = label_studios
        self._settle = settle

    def finish(self, job: Job, jobs: Jobs) -> str:
        """Does a job; answers in words what came of it.

        Done again, it goes on where it was left. Annotations that began with a prediction that is
        removed stay as they are.

        Raises:
            NotYet: what people made of the predictions is not counted yet.
            TakenOver: another run has the job.
            LabelStudioError: Label Studio could not do what was asked.
        """
        with self._database.reading() as session:
            project = session.get_one(Project, job.project_id)
        client = self._label_studios.client(project)
        if client is None:
            return "nothing was removed: LABEL_STUDIO_API_KEY is not set any more"
        while (wait := self._settle(project.id)) is not None:
            if wait:
                raise NotYet("what people made of the older predictions is counted first", wait)
            jobs.beat(job.id)
        return self._remove(project, client, job, jobs)

    def _remove(self, project: Project, client: LabelStudioClient, job: Job, jobs: Jobs) -> str:
        number = project.label_studio_id
        held = client.prediction_counts(number)
        # One of them may be live again by now.
        older = [v for v in job.payload["versions"] if held.get(v) and v != self._live(project.id)]
        total = sum(held[v] for v in older)
        removed = 0
        for version in older:
            for page in client.predictions(number, version):
                if self._live(project.id) == version:
                    break
                for prediction in page:
                    removed += _delete(client, prediction["id"])
                    if removed % _TELL_EVERY == 0:
                        jobs.advance(
                            job,
                            min(1.0, removed / total),
                            f"{removed:,} of {total:,} predictions of older versions removed",
                        )
        doubles = self._remove_doubles(client, number, self._live(project.id))
        words = f"{removed:,} predictions of older versions removed"
        if older:
            words += f" ({', '.join(older)})"
        return f"{words}, and {doubles} doubled ones" if doubles else words

    def _remove_doubles(self, client: LabelStudioClient, project: int, version: str) -> int:
        """A task that was opened while its prediction was imported may hold two."""
        removed = 0
        kept: set[int] = set()
        for page in client.predictions(project, version, doubled=True):
            for prediction in sorted(page, key=lambda p: int(p["id"])):
                if prediction["task"] in kept:
                    removed += _delete(client, prediction["id"])
                kept.add(prediction["task"])
        return removed

    def _live(self, project_id: int) -> str:
        with self._database.reading() as session:
            return session.get_one(Project, project_id).version


def older_versions(session: Session, project_id: int, live: str) -> list[str]:
    """Names under which this backend has made predictions for a project, but the live one."""
    names = [
        PRETRAINED,
        *session.scalars(
            select(ModelVersion.name)
            .where(ModelVersion.project_id == project_id)
            .order_by(ModelVersion.id)
        ),
    ]
    # Others may call theirs the same: it is ours only where we imported some.
    before_any = session.scalars(
        select(Job).where(
            Job.project_id == project_id, Job.kind == "autolabel", Job.version == UNTRAINED
        )
    )
    if any(job.payload.get("imported") for job in before_any):
        names.append(UNTRAINED)
    return [name for name in names if name != live]


def _delete(client: LabelStudioClient, number: int) -> int:
    """Deletes a prediction; answers how many that were."""
    try:
        client.delete_prediction(number)
    except NotFound:
        # Its task was deleted meanwhile.
        return 0
    return 1
