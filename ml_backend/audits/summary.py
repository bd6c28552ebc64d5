"""Summarises a project's audits: what became of predicted boxes, and the time that was saved.

The time saved is the time that the same boxes take without predictions, less the time that people
took. The former is computed from the stated costs, times the factor by which annotations without
predictions took longer than stated.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from ml_backend.audits.compare import Boxes
from ml_backend.audits.totals import Basis, Totals, read_totals
from ml_backend.reasons import Reason
from ml_backend.settings import Settings
from ml_backend.store.tables import PRETRAINED, ModelVersion

ENOUGH = 5
"""Annotations made without boxes from which their time is what the others are measured against."""


@dataclass(frozen=True, slots=True)
class Pace:
    """Holds the times that people took.

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
    """Holds the counts of boxes and the times of annotations that began with predictions.

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
        """Returns the fields as JSON holds them."""
        return {**asdict(self), "accepted_share": self.boxes.accepted_share}


@dataclass(frozen=True, slots=True)
class Summary:
    """Holds the summary of a project's audits.

    Attributes:
        ours: what was made of our predictions, of all versions together.
        versions: the same, by version.
        blind: how long people took for tasks that are kept without boxes.
        early: how long they took before the first version, where they began with nothing.
        against: what the hours are measured against.
    """

    ours: Outcome
    versions: dict[str, Outcome]
    blind: Pace | None
    early: Pace | None
    against: Reason

    def as_dict(self) -> dict[str, Any]:
        """Returns the fields as JSON holds them; `against` as a code and values."""
        return {
            **self.ours.as_dict(),
            "versions": {name: outcome.as_dict() for name, outcome in self.versions.items()},
            "blind": asdict(self.blind) if self.blind else None,
            "early": asdict(self.early) if self.early else None,
            "against": self.against.as_dict(),
        }


def summarise(session: Session, project_id: int, settings: Settings) -> Summary | None:
    """Summarises a project's audits; None where no prediction of ours has been used.

    Reads the running totals, not the audits. Seconds beyond `FAR_TOO_LONG` times what the stated
    costs give for deleting every predicted box and drawing every final one do not count: somebody
    has left the page open.
    """
    basis = Basis.of(session, project_id, settings)
    totals = read_totals(session, project_id, basis)
    ours = our_versions(session, project_id)
    shown = {
        group.version: sums
        for group, sums in totals.items()
        if group.began == "boxes" and group.version in ours
    }
    if not shown:
        return None
    blind, early = (
        _together(sums for group, sums in totals.items() if group.began == began)
        for began in ("blind", "early")
    )
    factor, against = _baseline(blind, early, basis)
    return Summary(
        ours=_outcome(_together(shown.values()), factor, basis),
        versions={name: _outcome(sums, factor, basis) for name, sums in sorted(shown.items())},
        blind=_pace(blind),
        early=_pace(early),
        against=against,
    )


def our_versions(session: Session, project_id: int) -> set[str]:
    """Reads the names under which this backend makes predictions with boxes for a project."""
    names = session.scalars(select(ModelVersion.name).where(ModelVersion.project_id == project_id))
    return {PRETRAINED, *names}


def _together(several: Iterable[Totals]) -> Totals:
    found = Totals()
    for totals in several:
        found.add(totals)
    return found


def _baseline(blind: Totals, early: Totals, basis: Basis) -> tuple[float, Reason]:
    """Computes how much longer than stated people take without boxes, and says by which sample.

    Tasks that are kept blind are a fair sample; those from before the first version are chosen
    otherwise and done with less practice, and help out only where the blind ones are too few.
    """
    for sample, code in ((blind, "audits.blind"), (_together((blind, early)), "audits.early")):
        stated = _by_hand(sample, basis)
        if sample.timed >= ENOUGH and stated > 0:
            values = {
                "annotations": sample.timed,
                "early": early.timed,
                "seconds": sample.seconds / sample.timed,
            }
            return sample.seconds / stated, Reason(code, values)
    stated_costs = {"look": basis.look, "draw": basis.draw, "needed": ENOUGH}
    return 1.0, Reason("audits.stated", stated_costs)


def _outcome(totals: Totals, factor: float, basis: Basis) -> Outcome:
    saved = factor * _by_hand(totals, basis) - totals.seconds
    return Outcome(
        annotations=totals.annotations,
        in_bulk=totals.annotations - totals.timed,
        boxes=totals.boxes,
        pace=_pace(totals),
        hours_saved=saved / 3600 if totals.timed else None,
    )


def _pace(totals: Totals) -> Pace | None:
    if not totals.timed:
        return None
    return Pace(
        totals.timed,
        totals.median,
        totals.seconds / totals.timed,
        totals.seconds / totals.timed_boxes if totals.timed_boxes else None,
    )


def _by_hand(totals: Totals, basis: Basis) -> float:
    """Computes the seconds in which all boxes of the timed annotations are drawn, as stated."""
    return basis.look * totals.timed + basis.draw * totals.timed_boxes
