"""What people made of the predictions that they were shown, and the time that it saved them.

Each annotation is compared with the prediction that it began with (`parent_prediction`): Label
Studio's editor copies the prediction's regions with their ids. What was saved is the time that the
same boxes take without predictions, less the time that people took.
"""

from __future__ import annotations

import logging
import statistics
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from ml_backend.acquisition.control_group import is_control
from ml_backend.label_studio.client import (
    Forbidden,
    LabelStudioClient,
    LabelStudioError,
    NotFound,
    Rejected,
)
from ml_backend.label_studio.controls.base import Control, Region
from ml_backend.label_studio.events import PredictionInfo
from ml_backend.label_studio.label_config import LabelConfigError, parse_label_config
from ml_backend.projects.clients import Clients
from ml_backend.settings import Settings
from ml_backend.store.database import Database
from ml_backend.store.tables import PRETRAINED, UNTRAINED, Annotation, Audit, ModelVersion, Project

_log = logging.getLogger(__name__)

BATCH = 100
"""Annotations that are counted in one go."""
PATIENCE = 10.0
"""Seconds that one go may take."""
AWAY = 60.0
"""Seconds until a Label Studio that could not be read is asked again."""
TOLERANCE = 0.001
"""Share of the image by which an edge may differ and count as left alone: percents are rounded."""
ENOUGH = 5
"""Annotations made without boxes from which their time is what the others are measured against."""
FAR_TOO_LONG = 3.0
"""Times the stated costs after which somebody has left the page open."""


@dataclass(frozen=True, slots=True)
class Boxes:
    """What became of boxes.

    Attributes:
        accepted: left as they were predicted.
        moved: moved or resized.
        relabelled: given another label, moved as well or not.
        deleted: predicted, and gone.
        added: drawn by hand.
    """

    accepted: int = 0
    moved: int = 0
    relabelled: int = 0
    deleted: int = 0
    added: int = 0

    @property
    def predicted(self) -> int:
        """Boxes that were shown."""
        return self.accepted + self.moved + self.relabelled + self.deleted

    @property
    def final(self) -> int:
        """Boxes that the annotations ended up with."""
        return self.accepted + self.moved + self.relabelled + self.added

    @property
    def accepted_share(self) -> float | None:
        """Share of the predicted boxes that were left alone; None where none was predicted."""
        return self.accepted / self.predicted if self.predicted else None


@dataclass(frozen=True, slots=True)
class Pace:
    """How long people took.

    Attributes:
        annotations: those whose time is known.
        median: seconds for each.
        mean: seconds for each.
        per_box: seconds for each box that they ended up with; None without boxes.
    """

    annotations: int
    median: float
    mean: float
    per_box: float | None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What people made of predictions.

    Attributes:
        annotations: those that began with one.
        in_bulk: those of them whose time is unknown: accepted in bulk, or made over the API.
        boxes: what became of the boxes.
        pace: how long the others took.
        hours_saved: by the others, against the baseline; negative where predictions cost time.
            None where no time is known.
    """

    annotations: int
    in_bulk: int
    boxes: Boxes
    pace: Pace | None
    hours_saved: float | None

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {**asdict(self), "accepted_share": self.boxes.accepted_share}


@dataclass(frozen=True, slots=True)
class Summary:
    """A project's audits.

    Attributes:
        ours: what was made of our predictions, of all versions together.
        versions: the same, by version.
        blind: how long people took for tasks that are kept without boxes.
        early: how long they took before the first version, where they began with nothing.
        against: what the hours are measured against, in words.
    """

    ours: Outcome
    versions: dict[str, Outcome]
    blind: Pace | None
    early: Pace | None
    against: str

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            **self.ours.as_dict(),
            "versions": {name: outcome.as_dict() for name, outcome in self.versions.items()},
            "blind": asdict(self.blind) if self.blind else None,
            "early": asdict(self.early) if self.early else None,
            "against": self.against,
        }

    def in_words(self) -> list[str]:
        """A line on the boxes, and one on the time where it is known."""
        boxes = self.ours.boxes
        lines = [
            f"of {boxes.predicted} predicted boxes in {self.ours.annotations} annotations"
            f"{f' ({self.ours.in_bulk} of them untimed)' if self.ours.in_bulk else ''}: "
            f"{boxes.accepted} accepted{_percent(boxes.accepted_share)}, {boxes.moved} moved, "
            f"{boxes.relabelled} relabelled, {boxes.deleted} deleted; {boxes.added} added by hand"
        ]
        if self.ours.hours_saved is not None and self.ours.pace is not None:
            hours = self.ours.hours_saved
            lines.append(
                f"{'saved' if hours >= 0 else 'lost'} {_duration(abs(hours))} "
                f"({self.ours.pace.mean:.1f} s an annotation with boxes), {self.against}"
            )
        return lines


@dataclass(frozen=True, slots=True)
class _Timed:
    """An audit, with what the summary needs of its annotation."""

    version: str | None
    blind: bool
    boxes: Boxes
    lead_time: float | None
    parent_prediction: int | None
    created_at: datetime | None


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
        # By project: up to where nothing is left to count, and whose cards are to be written.
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
        """What people made of a project's predictions; None where none has been used yet."""
        with self._database.reading() as session:
            return _summarise(session, project_id, self._settings)

    def _update(self, project_id: int) -> float | None:
        with self._database.reading() as session:
            project = session.get(Project, project_id)
            pending = _pending(session, project_id, self._counted.get(project_id, 0))
            ours = _our_versions(session, project_id)
        if project is None:
            return None
        if not pending:
            self._counted[project_id] = project.revision
            self._write_cards(project_id)
            return None
        client = self._label_studios.client(project)
        if client is None and project.is_default is None and self._label_studios.default():
            # It could not be asked whether the project is there.
            return AWAY
        controls = _controls(project)
        until = time.monotonic() + PATIENCE
        rows: list[dict[str, Any]] = []
        wait: float | None = None
        for annotation, known in pending:
            if time.monotonic() > until:
                wait = 0.0
                break
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
        self._store(rows)
        touched = {row["version"] for row in rows}
        touched |= {known.version for _, known in pending if known is not None}
        self._touched.setdefault(project_id, set()).update(touched & ours)
        if rows:
            # Others of the last one's revision may be left.
            self._counted[project_id] = pending[len(rows) - 1][0].revision
        if wait != 0:
            # Not after each of many batches: it sums up all there are.
            self._write_cards(project_id)
        return wait

    def _store(self, rows: list[dict[str, Any]]) -> None:
        if not rows:
            return
        with self._database.session() as session:
            statement = self._database.insert(Audit)
            new = statement.excluded
            keys = set(rows[0]) - {"annotation_id", "project_id"}
            session.execute(
                statement.on_conflict_do_update(
                    index_elements=["annotation_id"],
                    set_={key: new[key] for key in keys},
                    where=new.revision >= Audit.revision,
                ),
                rows,
            )

    def _write_cards(self, project_id: int) -> None:
        versions = self._touched.get(project_id)
        if not versions:
            return
        # Summed up before the writing begins: meanwhile, webhooks must be able to write.
        summary = self.summary(project_id)
        if summary is not None:
            self._write_into_cards(project_id, summary, versions & set(summary.versions))
        del self._touched[project_id]

    def _write_into_cards(self, project_id: int, summary: Summary, versions: set[str]) -> None:
        with self._database.session() as session:
            # Whoever changes versions holds their project first: in other orders, two would wait
            # for each other.
            session.get_one(Project, project_id, with_for_update=True)
            for version in session.scalars(
                select(ModelVersion).where(
                    ModelVersion.project_id == project_id, ModelVersion.name.in_(versions)
                )
            ):
                outcome = summary.versions[version.name].as_dict()
                version.card = {
                    **version.card,
                    "audits": {**outcome, "against": summary.against},
                }

    def _say_away(self, project: Project, error: LabelStudioError) -> None:
        """Once for each time that Label Studio is away."""
        if project.id not in self._away:
            self._away.add(project.id)
            _log.warning(
                "project %s: what became of predictions cannot be counted yet: %s",
                project.key,
                error,
            )


def compare(predicted: Sequence[Region], annotated: Sequence[Region]) -> Boxes:
    """Counts what became of predicted boxes, by their ids.

    Args:
        predicted: the boxes of a prediction.
        annotated: the boxes of an annotation that began with it.
    """
    left = {box.region_id: box for box in predicted}
    accepted = moved = relabelled = added = 0
    for box in annotated:
        before = left.pop(box.region_id, None)
        if before is None:
            added += 1
        elif before.label != box.label:
            relabelled += 1
        elif _differ(before, box):
            moved += 1
        else:
            accepted += 1
    return Boxes(accepted, moved, relabelled, len(left), added)


def by_origin(annotated: Sequence[Region], predicted: int | None) -> Boxes:
    """Counts by what the editor says of each box (`origin`), where the prediction cannot be read.

    It does not tell moved from relabelled: both count as moved.

    Args:
        annotated: the boxes of an annotation.
        predicted: how many boxes the prediction had; where None, it is not known how many of them
            were deleted, and none counts.
    """
    origins = [box.origin for box in annotated]
    accepted = origins.count("prediction")
    moved = origins.count("prediction-changed")
    deleted = 0 if predicted is None else max(0, predicted - accepted - moved)
    return Boxes(accepted, moved, 0, deleted, len(origins) - accepted - moved)


def _pending(
    session: Session, project_id: int, since: int
) -> list[tuple[Annotation, Audit | None]]:
    """The next annotations to count, of those that changed in a revision or after it."""
    found = session.execute(
        select(Annotation, Audit)
        .outerjoin(Audit, Audit.annotation_id == Annotation.id)
        .where(
            Annotation.project_id == project_id,
            Annotation.revision >= since,
            Annotation.deleted_at.is_(None),
            Annotation.was_cancelled.is_(False),
            or_(Audit.annotation_id.is_(None), Audit.revision < Annotation.revision),
        )
        .order_by(Annotation.revision, Annotation.id)
        .limit(BATCH)
    )
    return [(annotation, audit) for annotation, audit in found]


def _our_versions(session: Session, project_id: int) -> set[str]:
    names = session.scalars(select(ModelVersion.name).where(ModelVersion.project_id == project_id))
    return {PRETRAINED, *names}


def _controls(project: Project) -> Sequence[Control]:
    try:
        return parse_label_config(project.label_config).controls
    except LabelConfigError:
        # It has no boxes, so there are none to count.
        return ()


def _prediction(client: LabelStudioClient | None, number: int | None) -> PredictionInfo | None:
    """The prediction; None where there is none, or it cannot be had any more."""
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
    """A row of audits."""
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
        **asdict(boxes),
    }


def _boxes(result: Sequence[Any], controls: Sequence[Control]) -> list[Region]:
    return [region for c in controls for region in c.read_regions(result).regions]


def _differ(a: Region, b: Region) -> bool:
    return any(
        abs(one - other) > TOLERANCE
        for one, other in ((a.x1, b.x1), (a.y1, b.y1), (a.x2, b.x2), (a.y2, b.y2))
    )


def _counted(audit: Audit) -> Boxes:
    return Boxes(audit.accepted, audit.moved, audit.relabelled, audit.deleted, audit.added)


def _summarise(session: Session, project_id: int, settings: Settings) -> Summary | None:
    """A project's summary; None where no prediction of ours has been used.

    Seconds beyond `FAR_TOO_LONG` times what the stated costs give for deleting every predicted box
    and drawing every final one are cut off: somebody has left the page open.
    """
    first = session.scalar(
        select(ModelVersion.created_at)
        .where(ModelVersion.project_id == project_id, ModelVersion.promoted_at.is_not(None))
        .order_by(ModelVersion.id)
        .limit(1)
    )
    ours = _our_versions(session, project_id)
    rows = [
        _Timed(version, blind, Boxes(*counts), lead_time, parent, created_at)
        for version, blind, lead_time, parent, created_at, *counts in session.execute(
            select(
                Audit.version,
                Audit.blind,
                Annotation.lead_time,
                Annotation.parent_prediction,
                Annotation.created_at,
                Audit.accepted,
                Audit.moved,
                Audit.relabelled,
                Audit.deleted,
                Audit.added,
            )
            .join(Annotation, Annotation.id == Audit.annotation_id)
            .where(
                Audit.project_id == project_id,
                Annotation.deleted_at.is_(None),
                Annotation.was_cancelled.is_(False),
            )
        )
    ]
    shown = [row for row in rows if row.version in ours and not row.blind]
    if not shown:
        return None
    blind = [row for row in rows if row.blind and row.lead_time is not None]
    early = [row for row in rows if row.lead_time is not None and _unaided(row, first)]
    baseline = _baseline(blind, early, settings)
    by_version: dict[str, list[_Timed]] = {}
    for row in shown:
        by_version.setdefault(str(row.version), []).append(row)
    return Summary(
        ours=_outcome(shown, baseline, settings),
        versions={
            name: _outcome(rows, baseline, settings) for name, rows in sorted(by_version.items())
        },
        blind=_pace(blind, settings),
        early=_pace(early, settings),
        against=baseline.words,
    )


def _unaided(row: _Timed, first: datetime | None) -> bool:
    """Whether an annotation began with nothing because there was no version yet.

    Later ones that began with nothing may differ from the others in more than that.
    """
    return (
        # Before the first version a task may hold a prediction without boxes, which asks for it.
        (row.version == UNTRAINED or (row.version is None and row.parent_prediction is None))
        and row.boxes.predicted == 0
        and row.created_at is not None
        and (first is None or row.created_at < first)
    )


@dataclass(frozen=True, slots=True)
class _Baseline:
    """What work without boxes takes: `factor` times the stated costs."""

    factor: float
    words: str


def _baseline(blind: Sequence[_Timed], early: Sequence[_Timed], settings: Settings) -> _Baseline:
    """How much longer than stated people take without boxes, where enough was measured.

    Tasks that are kept blind are a fair sample; those from before the first version are chosen
    otherwise and done with less practice, and help out only where the blind ones are too few.
    """
    for rows, what in (
        (blind, "tasks that are kept without boxes"),
        (
            [*blind, *early],
            f"tasks without boxes, {len(early)} of them from before the first version",
        ),
    ):
        stated = sum(_by_hand(row.boxes.final, settings) for row in rows)
        if len(rows) >= ENOUGH and stated > 0:
            seconds = [_seconds(row, settings) for row in rows]
            return _Baseline(
                sum(seconds) / stated,
                f"measured against {len(rows)} annotations of {what} "
                f"({statistics.fmean(seconds):.1f} s an annotation)",
            )
    return _Baseline(
        1.0,
        f"reckoned with the stated costs ({settings.cost_look:g} s an image and "
        f"{settings.cost_draw:g} s a box), since fewer than {ENOUGH} annotations whose time is "
        "known were made without boxes",
    )


def _outcome(rows: Sequence[_Timed], baseline: _Baseline, settings: Settings) -> Outcome:
    timed = [row for row in rows if row.lead_time is not None]
    saved = sum(
        baseline.factor * _by_hand(row.boxes.final, settings) - _seconds(row, settings)
        for row in timed
    )
    return Outcome(
        annotations=len(rows),
        in_bulk=len(rows) - len(timed),
        boxes=_total(row.boxes for row in rows),
        pace=_pace(timed, settings),
        hours_saved=saved / 3600 if timed else None,
    )


def _total(boxes: Iterable[Boxes]) -> Boxes:
    counts = [(b.accepted, b.moved, b.relabelled, b.deleted, b.added) for b in boxes]
    return Boxes(*map(sum, zip(*counts, strict=True)))


def _pace(rows: Sequence[_Timed], settings: Settings) -> Pace | None:
    if not rows:
        return None
    seconds = [_seconds(row, settings) for row in rows]
    boxes = sum(row.boxes.final for row in rows)
    return Pace(
        len(rows),
        statistics.median(seconds),
        statistics.fmean(seconds),
        sum(seconds) / boxes if boxes else None,
    )


def _by_hand(boxes: int, settings: Settings) -> float:
    """Seconds for an image whose boxes are all drawn, by the stated costs."""
    return settings.cost_look + settings.cost_draw * boxes


def _seconds(row: _Timed, settings: Settings) -> float:
    worst = _by_hand(row.boxes.final, settings) + settings.cost_delete * row.boxes.predicted
    return min(row.lead_time or 0.0, FAR_TOO_LONG * worst)


def _percent(share: float | None) -> str:
    return "" if share is None else f" ({share:.0%})"


def _duration(hours: float) -> str:
    return f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"
