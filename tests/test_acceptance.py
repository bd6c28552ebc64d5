"""A version whose boxes people accept less than those of the one before is rolled back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ml_backend.audits.acceptance import ENOUGH_IMAGES, Acceptance, is_taken_worse
from ml_backend.audits.rollback import AuditedRollback
from ml_backend.store.states import VersionState
from ml_backend.store.tables import Annotation, Audit
from ml_backend.wording import words
from tests.job_loop import Loop

GOOD = [1.0, 0.9, 0.8, 1.0, 1.0, 0.7, 0.9, 1.0, 0.8, 1.0]


@pytest.mark.parametrize(
    ("after", "worse"),
    [
        ([0.4, 0.2, 0.5, 0.3, 0.6, 0.4, 0.2, 0.5, 0.4, 0.3], True),
        # Not enough of them, little behind, or as likely chance.
        ([0.4, 0.2, 0.5, 0.3, 0.6, 0.4, 0.2, 0.5, 0.4], False),
        ([share - 0.05 for share in GOOD], False),
        ([1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0], False),
        (GOOD, False),
        ([0.0] * ENOUGH_IMAGES, True),
    ],
)
def test_is_taken_worse_only_by_the_evidence(after: list[float], worse: bool) -> None:
    assert is_taken_worse(Acceptance(after), Acceptance(GOOD)) == worse


def test_is_taken_worse_without_any_spread_goes_by_the_mean() -> None:
    assert is_taken_worse(Acceptance([0.5] * 10), Acceptance([1.0] * 10))
    assert not is_taken_worse(Acceptance([1.0] * 10), Acceptance([1.0] * 10))


@pytest.fixture
def loop(database_url: str, tmp_path: Path) -> Iterator[Loop]:
    """A project with two versions, the second live."""
    loop = Loop(database_url, tmp_path)
    for name in ("v1", "v2"):
        loop.promoted(name)
        loop.backend.artefacts.publish(
            loop.project().key, name, lambda folder: None, {"version": name}
        )
    yield loop
    loop.close()


def _audited(loop: Loop, first: int, version: str, accepted: int, **fields: object) -> None:
    """Enters audits of ten annotations, of four predicted boxes each."""
    loop.annotate(range(first, first + 10))
    with loop.database.session() as session:
        for number in range(first, first + 10):
            row = session.query(Annotation).filter_by(label_studio_id=number).one()
            values = {"lead_time": 5.0, "standing": True, "blind": False, **fields}
            session.add(
                Audit(
                    annotation_id=row.id,
                    project_id=loop.project_id,
                    revision=row.revision,
                    version=version,
                    accepted=accepted,
                    moved=4 - accepted,
                    **values,
                )
            )


def _rollback(loop: Loop) -> AuditedRollback:
    return AuditedRollback(loop.database, loop.backend.versions)


def test_consider_live_version_accepted_less_goes_back_and_says_why(loop: Loop) -> None:
    _audited(loop, 1, "v1", 4)
    _audited(loop, 11, "v2", 1)
    assert _rollback(loop).consider(loop.project_id)
    assert loop.project().live_version == "v1"
    versions = {v.name: v for v in loop.backend.versions.all(loop.project_id)}
    assert versions["v2"].state == VersionState.ROLLED_BACK
    assert words(versions["v2"].reason) == (
        "rolled back to v1: of its boxes people accepted 25% in 10 images, of those of v1 100% "
        "in 10"
    )
    # Once is enough.
    assert not _rollback(loop).consider(loop.project_id)


@pytest.mark.parametrize("fields", [{"lead_time": None}, {"standing": False}, {"blind": True}])
def test_consider_audits_that_nobody_looked_at_count_for_nothing(
    loop: Loop, fields: dict[str, object]
) -> None:
    _audited(loop, 1, "v1", 4)
    _audited(loop, 11, "v2", 1, **fields)
    assert not _rollback(loop).consider(loop.project_id)
    assert loop.project().live_version == "v2"


def test_consider_artefact_of_the_one_before_is_gone_changes_nothing(loop: Loop) -> None:
    _audited(loop, 1, "v1", 4)
    _audited(loop, 11, "v2", 1)
    loop.backend.artefacts.remove(loop.project().key, "v1")
    assert not _rollback(loop).consider(loop.project_id)
    assert loop.project().live_version == "v2"
