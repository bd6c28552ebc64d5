"""Sums audits, and keeps the sums up to date as audits change.

A summary of a hundred thousand audits needs only a few sums. The transaction that changes an audit
also changes the sums: it subtracts the audit's former contribution and adds the new one. All sums
are integers, so they equal a recount exactly.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal, NamedTuple, Protocol

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from ml_backend.audits.compare import Boxes
from ml_backend.settings import Settings
from ml_backend.store.database import Database
from ml_backend.store.tables import Audit, AuditTotal, ModelVersion, Project

FAR_TOO_LONG = 3.0
"""Times the stated costs after which somebody has left the page open: what is beyond is cut off."""
Began = Literal["boxes", "blind", "early"]
"""With a version's prediction; on a task kept without boxes; before the first version."""


class Group(NamedTuple):
    """Names the audits that are summed together: how they began, and the version (or empty)."""

    began: str
    version: str


class Audited(Protocol):
    """Describes the columns of an audit that are summed: a row of a query, or an `Audit`."""

    version: str | None
    blind: bool
    standing: bool
    unaided: bool
    lead_time: float | None
    annotated_at: datetime | None
    accepted: int
    moved: int
    relabelled: int
    deleted: int
    added: int


@dataclass(frozen=True, slots=True)
class Basis:
    """Holds the values that sums depend on besides the audits: a change requires a new sum.

    Attributes:
        look: stated seconds for an image.
        draw: stated seconds for each box that is drawn.
        delete: stated seconds for each box that is deleted.
        first: when the first version was made; None before.
    """

    look: float
    draw: float
    delete: float
    first: datetime | None

    @classmethod
    def of(cls, session: Session, project_id: int, settings: Settings) -> Basis:
        """Reads the present basis of a project."""
        first = session.scalar(
            select(ModelVersion.created_at)
            .where(ModelVersion.project_id == project_id, ModelVersion.promoted_at.is_not(None))
            .order_by(ModelVersion.id)
            .limit(1)
        )
        return cls(settings.cost_look, settings.cost_draw, settings.cost_delete, first)

    def as_text(self) -> str:
        """Names the basis, to be stored beside the sums."""
        first = self.first.isoformat() if self.first is not None else "none"
        return f"{self.look!r} {self.draw!r} {self.delete!r} {first}"


@dataclass(slots=True)
class Totals:
    """Holds the sums of audits.

    Attributes:
        annotations: how many.
        boxes: what became of their boxes.
        timed: those whose time is known.
        timed_boxes: boxes that these ended up with.
        milliseconds: the time that these took, cut off where a page was left open.
        times: how many of these took each time, in seconds of three significant digits.
    """

    annotations: int = 0
    boxes: Boxes = field(default_factory=Boxes)
    timed: int = 0
    timed_boxes: int = 0
    milliseconds: int = 0
    times: Counter[str] = field(default_factory=Counter)

    @property
    def seconds(self) -> float:
        """Computes the time that the timed annotations took."""
        return self.milliseconds / 1000

    @property
    def median(self) -> float:
        """Computes the median time of the timed annotations, of which there must be one.

        Times are rounded, so that the median is right within 0.5 %.
        """
        ordered = sorted((float(time), count) for time, count in self.times.items() if count)
        low, high = (self.timed - 1) // 2, self.timed // 2
        found, passed = [], 0
        for time, count in ordered:
            found += [time for place in (low, high) if passed <= place < passed + count]
            passed += count
        return sum(found) / len(found)

    def add(self, other: Totals, sign: int = 1) -> None:
        """Adds other sums, or subtracts them (`sign=-1`)."""
        self.annotations += sign * other.annotations
        self.boxes = self.boxes.plus(other.boxes, sign)
        self.timed += sign * other.timed
        self.timed_boxes += sign * other.timed_boxes
        self.milliseconds += sign * other.milliseconds
        for time, count in other.times.items():
            self.times[time] += sign * count
            if not self.times[time]:
                del self.times[time]


def contribution(audit: Audited, basis: Basis) -> tuple[Group, Totals] | None:
    """Computes what an audit adds to the sums, and of which group; None where it counts nowhere."""
    began = _began(audit, basis)
    if began is None:
        return None
    boxes = Boxes(audit.accepted, audit.moved, audit.relabelled, audit.deleted, audit.added)
    totals = Totals(annotations=1, boxes=boxes)
    if audit.lead_time is not None:
        worst = basis.look + basis.draw * boxes.final + basis.delete * boxes.predicted
        seconds = min(audit.lead_time, FAR_TOO_LONG * worst)
        totals.timed, totals.timed_boxes = 1, boxes.final
        totals.milliseconds = round(1000 * seconds)
        totals.times[f"{seconds:.3g}"] = 1
    return Group(began, "" if began == "early" else audit.version or ""), totals


def _began(audit: Audited, basis: Basis) -> Began | None:
    if not audit.standing:
        return None
    if audit.blind:
        return "blind"
    # Later ones that began with nothing may differ from the others in more than that.
    at = audit.annotated_at
    if audit.unaided and at is not None and (basis.first is None or at < basis.first):
        return "early"
    return "boxes" if audit.version is not None else None


def change_totals(
    session: Session,
    project: Project,
    basis: Basis,
    before: Iterable[Audited],
    after: Iterable[Audited],
) -> None:
    """Brings a project's stored sums up to date; its audits were written in this transaction.

    Args:
        session: the transaction.
        project: locked.
        basis: the present one; where the sums were made by another one, all audits are summed.
        before: the audits that were replaced.
        after: the audits that replaced them, or are new.
    """
    if project.audit_basis != basis.as_text():
        _replace(session, project, basis, sum_audits(session, project.id, basis))
        return
    changes: dict[Group, Totals] = {}
    for audits, sign in ((before, -1), (after, 1)):
        for audit in audits:
            _add(changes, contribution(audit, basis), sign)
    for group, totals in changes.items():
        _change(session, project.id, group, totals)


def replace_totals(database: Database, project_id: int, settings: Settings) -> None:
    """Sums all audits of a project anew, and stores the sums with their basis.

    The audits are summed before the writing begins, for seconds where there are 100,000: meanwhile,
    webhooks must be able to write.
    """
    with database.reading() as session:
        basis = Basis.of(session, project_id, settings)
        state = _state(session, project_id)
        sums = sum_audits(session, project_id, basis)
    with database.session() as session:
        project = session.get_one(Project, project_id, with_for_update=True)
        if _state(session, project_id) != state:
            # Another worker has written audits meanwhile.
            sums = sum_audits(session, project_id, basis)
        _replace(session, project, basis, sums)


def read_totals(session: Session, project_id: int, basis: Basis) -> dict[Group, Totals]:
    """Reads a project's sums; where they were made by another basis, sums all its audits."""
    if session.get_one(Project, project_id).audit_basis != basis.as_text():
        return sum_audits(session, project_id, basis)
    rows = session.scalars(select(AuditTotal).where(AuditTotal.project_id == project_id))
    return {Group(row.began, row.version): _totals(row) for row in rows}


def sum_audits(session: Session, project_id: int, basis: Basis) -> dict[Group, Totals]:
    """Sums all audits of a project."""
    found: dict[Group, Totals] = {}
    audits = Audit.__table__.c
    columns = [audits[name] for name in Audited.__annotations__]
    for row in session.execute(select(*columns).where(Audit.project_id == project_id)):
        _add(found, contribution(row, basis), 1)
    return found


def _state(session: Session, project_id: int) -> tuple[int, int]:
    """Reads count and revisions of a project's audits, which tell whether one was written."""
    count, revisions = session.execute(
        select(func.count(), func.coalesce(func.sum(Audit.revision), 0)).where(
            Audit.project_id == project_id
        )
    ).one()
    return count, revisions


def _replace(
    session: Session, project: Project, basis: Basis, sums: Mapping[Group, Totals]
) -> None:
    session.execute(delete(AuditTotal).where(AuditTotal.project_id == project.id))
    for group, totals in sums.items():
        _change(session, project.id, group, totals)
    project.audit_basis = basis.as_text()


def _add(sums: dict[Group, Totals], contributed: tuple[Group, Totals] | None, sign: int) -> None:
    if contributed is not None:
        group, totals = contributed
        sums.setdefault(group, Totals()).add(totals, sign)


def _change(session: Session, project_id: int, group: Group, change: Totals) -> None:
    row = session.get(AuditTotal, (project_id, *group))
    totals = Totals() if row is None else _totals(row)
    totals.add(change)
    if row is None:
        row = AuditTotal(project_id=project_id, began=group.began, version=group.version)
        session.add(row)
    elif not totals.annotations:
        session.delete(row)
        return
    row.annotations = totals.annotations
    for name, count in totals.boxes.as_dict().items():
        setattr(row, name, count)
    row.timed, row.timed_boxes = totals.timed, totals.timed_boxes
    row.milliseconds = totals.milliseconds
    row.times = dict(totals.times)


def _totals(row: AuditTotal) -> Totals:
    times: Mapping[str, int] = row.times
    return Totals(
        row.annotations,
        Boxes(row.accepted, row.moved, row.relabelled, row.deleted, row.added),
        row.timed,
        row.timed_boxes,
        row.milliseconds,
        Counter(times),
    )
