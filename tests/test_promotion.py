"""Which version is live: the verdict on a new one, and going forth and back between them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError

from ml_backend.detection.evaluation import ClassChange, ClassQuality, Comparison, Evaluation
from ml_backend.projects.ingest import Ingest
from ml_backend.store.artefacts import ArtefactStore, VersionMissing
from ml_backend.store.database import Database
from ml_backend.store.tables import ModelVersion, Project
from ml_backend.training.promotion import (
    BAD_FALL,
    ENOUGH_BOXES,
    FINDS_SOMETHING,
    TIE,
    TIE_WITH_MORE,
    Verdict,
    Versions,
    counts_of,
    judge,
)

KEY = "1.1795463889"
BETTER = Verdict(True, "promoted: not worse")
WORSE = Verdict(False, "not promoted: worse")


def _evaluation(map50: float) -> Evaluation:
    return Evaluation(map50=map50, map=map50 / 2, per_class={}, images=30)


def _knowing(ap50: float | None) -> Evaluation:
    """An evaluation of a version that knows one label more."""
    quality = ClassQuality(ap50, ap50, recall=0.5, support=9, images=4)
    return replace(_evaluation(0.6), per_class={"new": quality})


def _comparison(delta: float, **classes: tuple[float, int]) -> Comparison:
    changes = {label: ClassChange(change, support) for label, (change, support) in classes.items()}
    return Comparison(delta, delta - 0.02, delta + 0.02, 0.5, changes)


@pytest.mark.parametrize("live", [None, "v1"])
def test_with_nothing_to_compare_it_must_find_something(live: str | None) -> None:
    # A live version whose artefact is broken leaves nothing to compare with, either.
    poor = judge(_evaluation(FINDS_SOMETHING - 0.01), None, live)
    assert not poor.promote
    assert poor.reason == "not promoted: AP50 0.09 is below 0.1; annotate more"
    first = judge(_evaluation(FINDS_SOMETHING), None, live)
    assert first.promote
    assert first.reason == "promoted: the first version that finds something, AP50 0.10"


def test_a_worse_version_is_not_promoted_however_good_it_is() -> None:
    verdict = judge(_evaluation(0.95), _comparison(-TIE - 0.001), "v1")
    assert not verdict.promote
    assert verdict.reason == (
        "not promoted: worse than v1 by AP50 -0.006 (90 % interval -0.026 to +0.014)"
    )


@pytest.mark.parametrize("delta", [-TIE, 0.0, 0.2])
def test_a_tie_or_a_gain_is_promoted(delta: float) -> None:
    verdict = judge(_evaluation(0.5), _comparison(delta), "v1")
    assert verdict.promote
    assert verdict.reason.startswith(f"promoted: not worse than v1, AP50 {delta:+.3f} (90 %")


def test_a_gain_at_the_cost_of_a_class_is_not_promoted() -> None:
    comparison = _comparison(0.1, cat=(0.5, 90), dog=(-BAD_FALL - 0.01, ENOUGH_BOXES))
    verdict = judge(_evaluation(0.6), comparison, "v1")
    assert not verdict.promote
    assert "dog falls by 0.16 AP50 against v1" in verdict.reason
    assert "the mean changes by +0.100" in verdict.reason


def test_a_version_that_finds_one_label_more_may_be_a_little_behind() -> None:
    behind = _comparison(-TIE - 0.001)
    verdict = judge(_knowing(0.4), behind, "v1", ["new"])
    assert verdict.promote
    assert verdict.reason == (
        "promoted: finds new (AP50 0.40), which v1 does not know, and is little behind on the "
        "others, AP50 -0.006 (90 % interval -0.026 to +0.014)"
    )
    # Where it does not find it, or is more than a little behind, nothing is gained.
    assert not judge(_knowing(FINDS_SOMETHING - 0.01), behind, "v1", ["new"]).promote
    assert not judge(_knowing(None), behind, "v1", ["new"]).promote
    assert not judge(_knowing(0.4), _comparison(-TIE_WITH_MORE - 0.001), "v1", ["new"]).promote
    fallen = _comparison(0.0, dog=(-BAD_FALL - 0.01, ENOUGH_BOXES))
    assert not judge(_knowing(0.4), fallen, "v1", ["new"]).promote


@pytest.mark.parametrize(
    ("fall", "boxes"), [(-0.9, ENOUGH_BOXES - 1), (-BAD_FALL, ENOUGH_BOXES), (0.3, 500)]
)
def test_a_class_that_falls_little_or_has_few_boxes_stops_nothing(fall: float, boxes: int) -> None:
    assert judge(_evaluation(0.6), _comparison(0.1, dog=(fall, boxes)), "v1").promote


def test_a_card_tells_the_boxes_of_each_label() -> None:
    assert counts_of({"data": {"boxes": {"cat": 3, "dog": 0}}}) == {"cat": 3, "dog": 0}
    assert counts_of({}) == {}


class Versioned:
    """A project, its versions and their artefacts."""

    def __init__(self, url: str, folder: Path) -> None:
        self.database = Database(url)
        self.database.migrate()
        self.folder = folder
        self.artefacts = ArtefactStore(folder)
        self.versions = Versions(self.database, self.artefacts)
        self.id = Ingest(self.database).introduce(KEY, 1, label_config="<View/>").id

    def add(self, name: str, verdict: Verdict = BETTER, *, revision: int = 1) -> None:
        """Publishes a version that was compared with the live one, and records it."""
        self.record(name, verdict, parent=self.live, revision=revision)

    def record(
        self, name: str, verdict: Verdict = BETTER, *, parent: str | None, revision: int = 1
    ) -> Verdict:
        """The same for a version that was compared with another one."""

        def write(folder: Path) -> None:
            (folder / "model.safetensors").write_bytes(name.encode())

        self.artefacts.publish(KEY, name, write, {"version": name})
        return self.versions.record(
            self.id, name, {"version": name}, verdict, parent=parent, revision=revision
        )

    @property
    def row(self) -> Project:
        """The project's row."""
        with self.database.reading() as session:
            return session.get_one(Project, self.id)

    @property
    def live(self) -> str | None:
        """The live version, once it is certain that it is the only one."""
        with self.database.reading() as session:
            marked = session.scalars(
                select(ModelVersion.name).where(
                    ModelVersion.project_id == self.id, ModelVersion.state == "live"
                )
            ).all()
        live = self.row.live_version
        assert list(marked) == ([live] if live is not None else [])
        return live

    def states(self) -> dict[str, str]:
        """State by version, oldest first."""
        return {v.name: v.state for v in reversed(self.versions.all(self.id))}

    def reason(self, name: str) -> str:
        """A version's reason."""
        return {v.name: v.reason for v in self.versions.all(self.id)}[name]


def _stored(project: Versioned) -> list[str]:
    """Names of the versions in the artefact store."""
    return sorted(path.name for path in (project.folder / "projects" / KEY).iterdir())


@pytest.fixture
def project(database_url: str, tmp_path: Path) -> Iterator[Versioned]:
    """A project without a version."""
    project = Versioned(database_url, tmp_path)
    yield project
    project.database.close()


def test_a_better_version_goes_live_and_retires_the_one_before(project: Versioned) -> None:
    project.add("v1")
    assert project.live == "v1"
    project.add("v2")
    assert project.live == "v2"
    assert project.states() == {"v1": "retired", "v2": "live"}
    newest = project.versions.all(project.id)[0]
    assert (newest.name, newest.parent, newest.card) == ("v2", "v1", {"version": "v2"})
    assert newest.promoted_at is not None
    assert newest.reason == BETTER.reason
    assert project.versions.count(project.id) == 2


def test_a_worse_version_is_kept_and_changes_nothing(project: Versioned) -> None:
    project.add("v1")
    project.add("v2", WORSE)
    assert project.live == "v1"
    assert project.states() == {"v1": "live", "v2": "rejected"}
    assert project.reason("v2") == WORSE.reason


def test_what_a_training_saw_counts_even_where_its_version_is_rejected(project: Versioned) -> None:
    project.add("v1", WORSE, revision=7)
    assert project.row.trained_revision == 7
    assert project.live is None
    project.add("v2", revision=5)
    assert project.row.trained_revision == 7


def test_a_name_is_recorded_once(project: Versioned) -> None:
    project.add("v1")
    with pytest.raises(IntegrityError):
        project.versions.record(project.id, "v1", {}, WORSE, parent=None, revision=9)
    assert project.live == "v1"
    assert project.row.trained_revision == 1


def test_an_admin_may_promote_a_rejected_version(project: Versioned) -> None:
    project.add("v1")
    project.add("v2", WORSE)
    project.versions.promote(project.id, "v2", "promoted by hand")
    assert project.live == "v2"
    assert project.states() == {"v1": "retired", "v2": "live"}
    assert project.reason("v2") == "promoted by hand"


def test_promoting_what_is_live_already_changes_nothing_else(project: Versioned) -> None:
    project.add("v1")
    project.add("v2")
    project.versions.promote(project.id, "v2", "again")
    assert project.live == "v2"
    assert project.versions.rollback(project.id) == "v1"


def test_a_rollback_goes_to_the_one_before_and_marks_what_it_left(project: Versioned) -> None:
    for name in ("v1", "v2", "v3"):
        project.add(name)
    assert project.versions.rollback(project.id) == "v2"
    assert project.live == "v2"
    assert project.states() == {"v1": "retired", "v2": "live", "v3": "rolled back"}
    assert project.reason("v2") == "rolled back from v3"
    assert project.reason("v3") == "rolled back to v2 on request"


def test_a_rollback_holds_and_a_second_goes_further_back(project: Versioned) -> None:
    for name in ("v1", "v2", "v3"):
        project.add(name)
    project.versions.rollback(project.id)
    assert project.versions.rollback(project.id) == "v1"
    assert project.live == "v1"
    with pytest.raises(VersionMissing, match=f"project {KEY} has no earlier version to go back"):
        project.versions.rollback(project.id)
    assert project.live == "v1"
    assert project.states() == {"v1": "live", "v2": "rolled back", "v3": "rolled back"}


def test_after_a_rollback_the_next_better_version_goes_live(project: Versioned) -> None:
    project.add("v1")
    project.add("v2")
    project.versions.rollback(project.id)
    project.add("v3")
    assert project.live == "v3"
    # What was rolled back stays out of the way.
    assert project.versions.rollback(project.id) == "v1"


def test_a_rollback_during_a_training_holds(project: Versioned) -> None:
    project.add("v1")
    project.add("v2", revision=3)
    project.versions.rollback(project.id)
    # The training began while v2 was live, and compared with it.
    verdict = project.record("v3", parent="v2", revision=9)
    assert project.live == "v1"
    assert not verdict.promote
    assert verdict.reason == project.reason("v3")
    assert verdict.reason.startswith(
        "not promoted: meanwhile v1 was made live, and it was compared with v2;"
    )
    assert project.states() == {"v1": "live", "v2": "rolled back", "v3": "rejected"}
    # What it saw leads to another training soon.
    assert project.row.trained_revision == 3
    project.versions.promote(project.id, "v3", "by hand")
    assert project.live == "v3"


def test_a_promotion_by_hand_during_the_first_training_holds(project: Versioned) -> None:
    project.add("v1", WORSE)
    project.versions.promote(project.id, "v1", "by hand")
    assert not project.record("v2", parent=None).promote
    assert project.live == "v1"


def test_a_worse_version_is_worse_whatever_went_live_meanwhile(project: Versioned) -> None:
    project.add("v1")
    project.add("v2")
    project.versions.rollback(project.id)
    assert project.record("v3", WORSE, parent="v2", revision=9) == WORSE
    assert project.row.trained_revision == 9


def test_a_rollback_goes_by_when_versions_were_live_not_by_their_age(project: Versioned) -> None:
    for name in ("v1", "v2", "v3"):
        project.add(name)
    project.versions.promote(project.id, "v1", "by hand")
    project.versions.promote(project.id, "v2", "by hand")
    assert project.versions.rollback(project.id) == "v1"
    assert project.versions.rollback(project.id) == "v3"


def test_a_rollback_may_name_where_it_goes(project: Versioned) -> None:
    for name in ("v1", "v2", "v3"):
        project.add(name)
    assert project.versions.rollback(project.id, to="v1") == "v1"
    assert project.states() == {"v1": "live", "v2": "retired", "v3": "rolled back"}
    # Named, even what was rolled back may come again.
    assert project.versions.rollback(project.id, to="v3") == "v3"
    assert project.states() == {"v1": "rolled back", "v2": "retired", "v3": "live"}
    assert project.live == "v3"


def test_a_rollback_that_cannot_be_says_why_and_changes_nothing(project: Versioned) -> None:
    with pytest.raises(VersionMissing, match="no earlier version"):
        project.versions.rollback(project.id)
    project.add("v1")
    with pytest.raises(VersionMissing, match="no earlier version"):
        project.versions.rollback(project.id)
    with pytest.raises(VersionMissing, match="v1 is live already"):
        project.versions.rollback(project.id, to="v1")
    with pytest.raises(VersionMissing, match=f"project {KEY} has no version v9: `ml-backend"):
        project.versions.rollback(project.id, to="v9")
    assert project.states() == {"v1": "live"}
    assert project.live == "v1"


def test_a_version_whose_folder_is_gone_is_not_made_live(project: Versioned) -> None:
    project.add("v1")
    project.add("v2")
    project.artefacts.remove(KEY, "v1")
    for attempt in (
        lambda: project.versions.rollback(project.id),
        lambda: project.versions.rollback(project.id, to="v1"),
        lambda: project.versions.promote(project.id, "v1", "by hand"),
    ):
        with pytest.raises(VersionMissing, match=r"version v1 is not in .*: restore the folder"):
            attempt()
    assert project.live == "v2"
    assert project.states() == {"v1": "retired", "v2": "live"}


def test_a_version_of_another_project_is_not_known_here(project: Versioned) -> None:
    project.add("v1")
    other = Ingest(project.database).introduce("2.1795463889", 2, label_config="<View/>").id
    with pytest.raises(VersionMissing, match=r"project 2\.1795463889 has no version v1"):
        project.versions.promote(other, "v1", "by hand")
    assert project.versions.all(other) == []
    assert project.live == "v1"


def test_many_promotions_at_once_leave_exactly_one_live(project: Versioned) -> None:
    names = [f"v{i}" for i in range(1, 9)]
    for name in names:
        project.add(name, WORSE)
    with ThreadPoolExecutor(8) as pool:
        for done in [
            pool.submit(project.versions.promote, project.id, name, f"by {name}")
            for name in names * 3
        ]:
            done.result()
    assert project.live in names
    assert sorted(project.states().values()) == ["live"] + ["retired"] * 7


def test_pruning_keeps_the_live_the_one_before_and_the_newest(project: Versioned) -> None:
    for name in ("v1", "v2", "v3"):
        project.add(name)
    for name in ("v4", "v5", "v6", "v7"):
        project.add(name, WORSE)
    assert sorted(project.versions.prune(project.id, 2)) == ["v1", "v4", "v5"]
    assert _stored(project) == ["v2", "v3", "v6", "v7"]
    assert project.states() == {
        "v1": "pruned",
        "v2": "retired",
        "v3": "live",
        "v4": "pruned",
        "v5": "pruned",
        "v6": "rejected",
        "v7": "rejected",
    }
    assert project.versions.prune(project.id, 2) == []
    # Versions are numbered on, whatever was pruned.
    assert project.versions.count(project.id) == 7
    assert project.versions.rollback(project.id) == "v2"


def test_pruning_keeps_old_versions_that_an_admin_went_back_to(project: Versioned) -> None:
    for name in ("v1", "v2", "v3", "v4"):
        project.add(name)
    project.versions.rollback(project.id, to="v1")
    # Live is v1, and before it, of those that were not rolled back, v3.
    assert project.versions.prune(project.id, 1) == ["v2"]
    assert _stored(project) == ["v1", "v3", "v4"]


def test_a_version_that_is_being_pruned_is_not_made_live(project: Versioned) -> None:
    for name in ("v1", "v2", "v3"):
        project.add(name)
    tried: list[str] = []

    class Slow(ArtefactStore):
        """Somebody promotes before the folder is gone."""

        def remove(self, project_key: str, version: str) -> None:
            with pytest.raises(VersionMissing, match=f"{version} was deleted to make room"):
                project.versions.promote(project.id, version, "by hand")
            with pytest.raises(VersionMissing, match=f"{version} was deleted to make room"):
                project.versions.rollback(project.id, to=version)
            tried.append(version)
            super().remove(project_key, version)

    assert Versions(project.database, Slow(project.folder)).prune(project.id, 1) == ["v1"]
    assert tried == ["v1"]
    assert project.live == "v3"


def test_a_pruned_version_cannot_be_gone_back_to(project: Versioned) -> None:
    for name in ("v1", "v2", "v3"):
        project.add(name)
    assert project.versions.prune(project.id, 1) == ["v1"]
    with pytest.raises(VersionMissing, match="version v1 was deleted to make room"):
        project.versions.rollback(project.id, to="v1")
    project.versions.rollback(project.id)
    with pytest.raises(VersionMissing, match="no earlier version"):
        project.versions.rollback(project.id)
    assert project.live == "v2"
