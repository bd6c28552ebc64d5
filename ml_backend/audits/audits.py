"""Compares annotations with the predictions that they began with, and keeps the counts.

An annotation names the prediction that it began with in `parent_prediction`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from typing import Any

from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from ml_backend.acquisition.control_group import is_control
from ml_backend.audits.compare import Boxes, by_origin, compare
from ml_backend.audits.summary import Summary, our_versions, summarise
from ml_backend.audits.totals import Basis, change_totals, replace_totals
from ml_backend.label_studio.client import LabelStudioClient
from ml_backend.label_studio.controls.base import Control, Region
from ml_backend.label_studio.errors import Forbidden, LabelStudioError, NotFound, Rejected
from ml_backend.label_studio.events import PredictionInfo
from ml_backend.label_studio.label_config import LabelConfigError, parse_label_config
from ml_backend.projects.clients import Clients
from ml_backend.settings import Settings
from ml_backend.store.database import Database
from ml_backend.store.tables import UNTRAINED, Annotation, Audit, ModelVersion, Project

_log = logging.getLogger(__name__)

BATCH = 100
"""Annotations that are counted in one go."""
PATIENCE = 10.0
"""Seconds that one go may take."""
AWAY = 60.0
"""Seconds until a Label Studio that could not be read is asked again."""


class Audits:
    """Counts what became of predictions, and keeps the counts up to date.

    Args:
        settings: the share of blind tasks, and what people's work costs.
        database: annotations, and their audits.
        label_studios: where the predictions are read.
    """

    def __init__(self, settings: Settings, database: Database, label_studios: Clients) -> None:
        self._settings = settings
        self._database = database
        self._label_studios = label_studios
        self._turn = threading.Lock()
        self._away: set[int] = set()
        # By project: the revision up to which all is counted, and versions with cards to write.
        self._counted: dict[int, int] = {}
        self._touched: dict[int, set[str]] = {}

    def update(self, project_id: int) -> float | None:
        """Counts annotations that are new, or that changed since they were counted.

        At most `BATCH` of them, for about `PATIENCE` seconds, and one call at a time in a
        process: a slow Label Studio holds up one of the worker's threads, not all.

        Returns:
            Seconds until it wants to be called again; None where all is counted.
        """
        if not self._turn.acquire(blocking=False):
            return PATIENCE
        try:
            return self._update(project_id)
        finally:
            self._turn.release()

    def summary(self, project_id: int) -> Summary | None:
        """Summarises a project's audits; None where no prediction has been used yet."""
        with self._database.reading() as session:
            return summarise(session, project_id, self._settings)

    def _update(self, project_id: int) -> float | None:
        with self._database.reading() as session:
            project = session.get(Project, project_id)
            pending = _pending(session, project_id, self._counted.get(project_id, 0))
            ours = our_versions(session, project_id)
            basis = Basis.of(session, project_id, self._settings).as_text()
        if project is None:
            return None
        if project.audit_basis != basis:
            replace_totals(self._database, project_id, self._settings)
        if not pending:
            self._counted[project_id] = project.revision
            self._write_cards(project_id)
            return None
        client = self._label_studios.client(project)
        if client is None and project.is_default is None and self._label_studios.default():
            # Label Studio did not answer whether it holds the project.
            return AWAY
        controls = _controls(project)
        until = time.monotonic() + PATIENCE
        rows: list[dict[str, Any]] = []
        wait: float | None = None
        for annotation, known in pending:
            if time.monotonic() > until:
                wait = 0.0
                break
            if known is not None and not _stands(annotation):
                rows.append(_taken_out(annotation, known))
                continue
            try:
                prediction = _prediction(client, annotation.parent_prediction)
            except LabelStudioError as error:
                self._say_away(project, error)
                wait = AWAY
                break
            rows.append(
                _audit(annotation, known, prediction, controls, ours, self._settings.blind_share)
            )
        else:
            self._away.discard(project_id)
            wait = 0.0 if len(pending) == BATCH else None
        if rows:
            self._store(project_id, rows)
        touched = {row["version"] for row in rows}
        touched |= {known.version for _, known in pending if known is not None}
        self._touched.setdefault(project_id, set()).update(touched & ours)
        if rows:
            # Other annotations of the last one's revision may be left.
            self._counted[project_id] = pending[len(rows) - 1][0].revision
        if wait != 0:
            # Between batches the cards are not written: the last batch writes them.
            self._write_cards(project_id)
        return wait

    def _store(self, project_id: int, rows: Sequence[dict[str, Any]]) -> None:
        """Writes audits, and the sums that they change, in one transaction."""
        with self._database.session() as session:
            # The lock on the project lets the second of two workers see the rows of the first.
            project = session.get_one(Project, project_id, with_for_update=True)
            before = {
                audit.annotation_id: audit
                for audit in session.scalars(
                    select(Audit).where(Audit.annotation_id.in_([r["annotation_id"] for r in rows]))
                )
            }
            newer = [
                row
                for row in rows
                if (known := before.get(row["annotation_id"])) is None
                or known.revision <= row["revision"]
            ]
            replaced = [
                before[row["annotation_id"]] for row in newer if row["annotation_id"] in before
            ]
            for audit in replaced:
                session.expunge(audit)
            if newer:
                statement = self._database.insert(Audit)
                keys = set(newer[0]) - {"annotation_id", "project_id"}
                session.execute(
                    statement.on_conflict_do_update(
                        index_elements=["annotation_id"],
                        set_={key: statement.excluded[key] for key in keys},
                    ),
                    newer,
                )
            basis = Basis.of(session, project_id, self._settings)
            change_totals(session, project, basis, replaced, [Audit(**row) for row in newer])

    def _write_cards(self, project_id: int) -> None:
        versions = self._touched.get(project_id)
        if not versions:
            return
        # Summed up before the transaction that writes, which would hold up webhooks.
        summary = self.summary(project_id)
        if summary is not None:
            self._write_into_cards(project_id, summary, versions & set(summary.versions))
        del self._touched[project_id]

    def _write_into_cards(self, project_id: int, summary: Summary, versions: set[str]) -> None:
        with self._database.session() as session:
            # Every transaction that changes versions locks their project first: in another order,
            # two transactions would wait for each other.
            session.get_one(Project, project_id, with_for_update=True)
            for version in session.scalars(
                select(ModelVersion).where(
                    ModelVersion.project_id == project_id, ModelVersion.name.in_(versions)
                )
            ):
                outcome = summary.versions[version.name].as_dict()
                version.card = {
                    **version.card,
                    "audits": {**outcome, "against": summary.against.as_dict()},
                }

    def _say_away(self, project: Project, error: LabelStudioError) -> None:
        """Logs that Label Studio is away, once until it answers again."""
        if project.id not in self._away:
            self._away.add(project.id)
            _log.warning(
                "project %s: what became of predictions cannot be counted yet: %s",
                project.key,
                error,
            )


def _pending(
    session: Session, project_id: int, since: int
) -> list[tuple[Annotation, Audit | None]]:
    """Reads the next annotations to count, of those that changed in a revision or after it."""
    found = session.execute(
        select(Annotation, Audit)
        .outerjoin(Audit, Audit.annotation_id == Annotation.id)
        .where(
            Annotation.project_id == project_id,
            Annotation.revision >= since,
            or_(
                # An annotation that is deleted or skipped by now is taken out of the sums.
                Audit.revision < Annotation.revision,
                Audit.annotation_id.is_(None)
                & Annotation.deleted_at.is_(None)
                & Annotation.was_cancelled.is_(False),
            ),
        )
        .order_by(Annotation.revision, Annotation.id)
        .limit(BATCH)
    )
    return [(annotation, audit) for annotation, audit in found]


def _controls(project: Project) -> Sequence[Control]:
    try:
        return parse_label_config(project.label_config).controls
    except LabelConfigError:
        # It has no boxes, so there are none to count.
        return ()


def _prediction(client: LabelStudioClient | None, number: int | None) -> PredictionInfo | None:
    """Reads a prediction; None where there is none, or where it was deleted."""
    if client is None or number is None:
        return None
    try:
        return client.prediction(number)
    except (NotFound, Forbidden, Rejected):
        return None


def _audit(
    annotation: Annotation,
    known: Audit | None,
    prediction: PredictionInfo | None,
    controls: Sequence[Control],
    ours: set[str],
    blind_share: float,
) -> dict[str, Any]:
    """Compares an annotation with the prediction that it began with: a row of audits."""
    annotated = _boxes(annotation.result, controls)
    if prediction is not None:
        boxes = compare(_boxes(prediction.result, controls), annotated)
        version = prediction.model_version
        # Shown without boxes on purpose, or because nothing was found: such a task is like the
        # others of its kind, and counts for them all.
        blind = (
            version in ours
            and boxes.predicted == 0
            and annotation.task_id is not None
            and is_control(annotation.task_id, blind_share)
        )
    else:
        # Deleting a prediction takes its number out of the annotation, too.
        before = None if known is None or known.version is None else _counted(known)
        boxes = by_origin(annotated, None if before is None else before.predicted)
        version = None if known is None else known.version
        blind = known is not None and known.blind
    return {
        "annotation_id": annotation.id,
        "project_id": annotation.project_id,
        "revision": annotation.revision,
        "version": version[:128] if version else None,
        "blind": blind,
        "standing": True,
        "unaided": boxes.predicted == 0
        and (version == UNTRAINED or (version is None and annotation.parent_prediction is None)),
        "lead_time": annotation.lead_time,
        "annotated_at": annotation.created_at,
        **boxes.as_dict(),
    }


def _stands(annotation: Annotation) -> bool:
    return annotation.deleted_at is None and not annotation.was_cancelled


def _taken_out(annotation: Annotation, known: Audit) -> dict[str, Any]:
    """Makes the row of an audit whose annotation was deleted or skipped: its counts are kept.

    Where the annotation comes back, its prediction may be gone.
    """
    columns = {column.key: getattr(known, column.key) for column in Audit.__table__.columns}
    return {**columns, "revision": annotation.revision, "standing": False}


def _boxes(result: Sequence[Any], controls: Sequence[Control]) -> list[Region]:
    return [region for c in controls for region in c.read_regions(result).regions]


def _counted(audit: Audit) -> Boxes:
    return Boxes(audit.accepted, audit.moved, audit.relabelled, audit.deleted, audit.added)
