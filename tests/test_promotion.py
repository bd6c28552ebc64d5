"""Test which version is live: the verdict on a new one, promotion, rollback and pruning."""

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
from ml_backend.reasons import Code, Reason, reason
from ml_backend.store.artefacts import ArtefactStore, VersionMissing
from ml_backend.store.database import Database
from ml_backend.store.tables import ModelVersion, Project
from ml_backend.training.promotion import (
    BAD_FALL,
    BEHIND_BEST,
    BEHIND_WITH_MORE,
    ENOUGH_BOXES,
    FINDS_SOMETHING,
    TIE,
    UNLIKELY,
    Verdict,
    Versions,
    counts_of,
    judge,
)
from ml_backend.wording import words
from tests.conftest import record_version

KEY = "1.1795463889"
BETTER = Verdict(True, reason(Code.NOT_WORSE, live="v1", delta=0.0, low=-0.1, high=0.1))
WORSE = Verdict(False, reason(Code.WORSE, live="v1", delta=-0.2, low=-0.3, high=-0.1))


def _evaluation(map50: float) -> Evaluation:
    return Evaluation(map50=map50, map=map50 / 2, per_class={}, images=30)


def _knowing(ap50: float | None) -> Evaluation:
    """Makes the evaluation of a version that knows one label more."""
    quality = ClassQuality(ap50, ap50, recall=0.5, support=9, images=4)
    return replace(_evaluation(0.6), per_class={"new": quality})


def _comparison(delta: float, **classes: tuple[float, int]) -> Comparison:
    changes = {label: ClassChange(change, support) for label, (change, support) in classes.items()}
    return Comparison(delta, delta - 0.02, delta + 0.02, 0.5, changes)


@pytest.mark.parametrize("live", [None, "v1"])
def test_judge_nothing_to_compare_with_promotes_only_what_finds_something(live: str | None) -> None:
    # A live version whose artefact is broken leaves nothing to compare with, either.
    poor = judge(_evaluation(FINDS_SOMETHING - 0.01), None, live)
    assert not poor.promote
    assert words(poor.reason) == "not promoted: AP50 0.09 is below 0.1; annotate more"
    first = judge(_evaluation(FINDS_SOMETHING), None, live)
    assert first.promote
    assert words(first.reason) == "promoted: the first version that finds something, AP50 0.10"


def test_judge_worse_by_the_evidence_is_not_promoted_however_good() -> None:
    verdict = judge(_evaluation(0.95), _comparison(-0.021), "v1")
    assert not verdict.promote
    assert words(verdict.reason) == (
        "not promoted: worse than v1 by AP50 -0.021 (90 % interval -0.041 to -0.001)"
    )


@pytest.mark.parametrize("delta", [-0.019, 0.0, 0.2])
def test_judge_not_shown_to_be_worse_is_promoted(delta: float) -> None:
    verdict = judge(_evaluation(0.5), _comparison(delta), "v1")
    assert verdict.promote
    assert words(verdict.reason).startswith(f"promoted: not worse than v1, AP50 {delta:+.3f} (90 %")


@pytest.mark.parametrize(("delta", "promote"), [(-TIE - 0.001, False), (-TIE, True), (0.1, True)])
def test_judge_of_another_recipe_has_to_be_as_good(delta: float, promote: bool) -> None:
    verdict = judge(_evaluation(0.5), _comparison(delta), "v1", same_recipe=False)
    assert verdict.promote == promote


def test_judge_worse_than_the_live_head_is_not_promoted_and_says_so() -> None:
    worse = replace(_comparison(-0.01), probability_better=UNLIKELY - 0.01)
    verdict = judge(_evaluation(0.9), None, None, live_head=worse)
    assert not verdict.promote
    assert words(verdict.reason) == (
        "not promoted: worse by AP50 -0.010 (90 % interval -0.030 to +0.010) than the live head, "
        "which learns the same images in seconds; annotate more"
    )
    as_likely = replace(worse, probability_better=UNLIKELY)
    assert judge(_evaluation(0.9), None, None, live_head=as_likely).promote


def test_judge_ten_versions_each_a_little_behind_the_last_stop_near_the_best() -> None:
    quality = best = 0.80
    for _ in range(10):
        new = quality - 0.006
        # The evidence of each step alone does not say that the version is worse.
        verdict = judge(
            _evaluation(new), _comparison(-0.006), "v1", best=("v0", _comparison(new - best))
        )
        if verdict.promote:
            quality = new
    assert quality >= best - BEHIND_BEST - 1e-9
    assert not verdict.promote
    assert words(verdict.reason).startswith(
        "not promoted: behind v0, the best so far on the hold-out, by AP50 -0.024"
    )


def test_judge_gain_at_the_cost_of_a_label_is_not_promoted() -> None:
    comparison = _comparison(0.1, cat=(0.5, 90), dog=(-BAD_FALL - 0.01, ENOUGH_BOXES))
    verdict = judge(_evaluation(0.6), comparison, "v1")
    assert not verdict.promote
    assert "dog falls by 0.16 AP50 against v1" in words(verdict.reason)
    assert "the mean changes by +0.100" in words(verdict.reason)
    assert verdict.reason.code == Code.LABEL_FALLS
    assert verdict.reason.values["label"] == "dog"


def test_judge_finds_a_new_label_and_little_behind_is_promoted() -> None:
    behind = replace(_comparison(-0.015), high=-0.001)
    verdict = judge(_knowing(0.4), behind, "v1", ["new"])
    assert verdict.promote
    assert words(verdict.reason) == (
        "promoted: finds new (AP50 0.40), which v1 does not know, and is little behind on the "
        "others, AP50 -0.015 (90 % interval -0.035 to -0.001)"
    )
    # Where the label is not found, or the others fall further behind, the version is worse.
    assert not judge(_knowing(FINDS_SOMETHING - 0.01), behind, "v1", ["new"]).promote
    assert not judge(_knowing(None), behind, "v1", ["new"]).promote
    assert not judge(_knowing(0.4), _comparison(-BEHIND_WITH_MORE - 0.001), "v1", ["new"]).promote
    fallen = _comparison(0.0, dog=(-BAD_FALL - 0.01, ENOUGH_BOXES))
    assert not judge(_knowing(0.4), fallen, "v1", ["new"]).promote


@pytest.mark.parametrize(
    ("fall", "boxes"), [(-0.9, ENOUGH_BOXES - 1), (-BAD_FALL, ENOUGH_BOXES), (0.3, 500)]
)
def test_judge_label_falls_little_or_has_few_boxes_is_promoted(fall: float, boxes: int) -> None:
    assert judge(_evaluation(0.6), _comparison(0.1, dog=(fall, boxes)), "v1").promote


def test_counts_of_card_gives_the_boxes_of_each_label() -> None:
    assert counts_of({"data": {"boxes": {"cat": 3, "dog": 0}}}) == {"cat": 3, "dog": 0}
    assert counts_of({}) == {}


class Versioned:
    """Holds a project, its versions and their artefacts."""

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
        self,
        name: str,
        verdict: Verdict = BETTER,
        *,
        parent: str | None,
        revision: int = 1,
        **card: object,
    ) -> Verdict:
        """Publishes and records a version that was compared with a given one."""

        def write(folder: Path) -> None:
            (folder / "model.safetensors").write_bytes(name.encode())

        self.artefacts.publish(KEY, name, write, {"version": name})
        return record_version(
            self.versions,
            self.database,
            self.id,
            name,
            {"version": name, **card},
            verdict,
            parent=parent,
            revision=revision,
        )

    @property
    def row(self) -> Project:
        """Reads the project's row."""
        with self.database.reading() as session:
            return session.get_one(Project, self.id)

    @property
    def live(self) -> str | None:
        """Reads the live version, and checks that no other one is marked as live."""
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
        """Reads the states by version, oldest first."""
        return {v.name: v.state for v in reversed(self.versions.all(self.id))}

    def reason(self, name: str) -> Reason:
        """Reads a version's reason."""
        return {v.name: v.reason for v in self.versions.all(self.id)}[name]


def _stored(project: Versioned) -> list[str]:
    """Lists the versions in the artefact store."""
    return sorted(path.name for path in (project.folder / "projects" / KEY).iterdir())


@pytest.fixture
def project(database_url: str, tmp_path: Path) -> Iterator[Versioned]:
    """Makes a project without a version."""
    project = Versioned(database_url, tmp_path)
    yield project
    project.database.close()


def test_record_better_version_goes_live_and_retires_the_one_before(project: Versioned) -> None:
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


def test_record_worse_version_is_kept_and_live_stays(project: Versioned) -> None:
    project.add("v1")
    project.add("v2", WORSE)
    assert project.live == "v1"
    assert project.states() == {"v1": "live", "v2": "rejected"}
    assert project.reason("v2") == WORSE.reason


def test_record_rejected_version_counts_what_its_training_saw(project: Versioned) -> None:
    project.add("v1", WORSE, revision=7)
    assert project.row.trained_revision == 7
    assert project.live is None
    project.add("v2", revision=5)
    assert project.row.trained_revision == 7


def test_record_name_twice_is_refused_and_changes_nothing(project: Versioned) -> None:
    project.add("v1")
    with pytest.raises(IntegrityError):
        record_version(
            project.versions,
            project.database,
            project.id,
            "v1",
            {},
            WORSE,
            parent=None,
            revision=9,
        )
    assert project.live == "v1"
    assert project.row.trained_revision == 1


def test_promote_rejected_version_is_live(project: Versioned) -> None:
    project.add("v1")
    project.add("v2", WORSE)
    project.versions.promote(project.id, "v2")
    assert project.live == "v2"
    assert project.states() == {"v1": "retired", "v2": "live"}
    assert words(project.reason("v2")) == "promoted on request"


def test_promote_live_version_changes_nothing_else(project: Versioned) -> None:
    project.add("v1")
    project.add("v2")
    project.versions.promote(project.id, "v2")
    assert project.live == "v2"
    assert project.versions.rollback(project.id) == "v1"


def test_rollback_goes_to_the_one_before_and_marks_what_it_left(project: Versioned) -> None:
    for name in ("v1", "v2", "v3"):
        project.add(name)
    assert project.versions.rollback(project.id) == "v2"
    assert project.live == "v2"
    assert project.states() == {"v1": "retired", "v2": "live", "v3": "rolled back"}
    assert words(project.reason("v2")) == "rolled back from v3"
    assert words(project.reason("v3")) == "rolled back to v2 on request"


def test_rollback_twice_goes_further_back(project: Versioned) -> None:
    for name in ("v1", "v2", "v3"):
        project.add(name)
    project.versions.rollback(project.id)
    assert project.versions.rollback(project.id) == "v1"
    assert project.live == "v1"
    with pytest.raises(VersionMissing, match=f"project {KEY} has no earlier version to go back"):
        project.versions.rollback(project.id)
    assert project.live == "v1"
    assert project.states() == {"v1": "live", "v2": "rolled back", "v3": "rolled back"}


def test_record_better_version_after_a_rollback_goes_live(project: Versioned) -> None:
    project.add("v1")
    project.add("v2")
    project.versions.rollback(project.id)
    project.add("v3")
    assert project.live == "v3"
    # A version that was rolled back is passed over.
    assert project.versions.rollback(project.id) == "v1"


def test_record_after_a_rollback_during_the_training_is_not_promoted(project: Versioned) -> None:
    project.add("v1")
    project.add("v2", revision=3)
    project.versions.rollback(project.id)
    # The training began while v2 was live, and compared with it.
    verdict = project.record("v3", parent="v2", revision=9)
    assert project.live == "v1"
    assert not verdict.promote
    assert verdict.reason == project.reason("v3")
    assert words(verdict.reason).startswith(
        "not promoted: meanwhile v1 was made live, and it was compared with v2;"
    )
    assert project.states() == {"v1": "live", "v2": "rolled back", "v3": "rejected"}
    # What it saw leads to another training soon.
    assert project.row.trained_revision == 3
    project.versions.promote(project.id, "v3")
    assert project.live == "v3"


def test_record_after_a_promotion_during_the_first_training_is_not_promoted(
    project: Versioned,
) -> None:
    project.add("v1", WORSE)
    project.versions.promote(project.id, "v1")
    assert not project.record("v2", parent=None).promote
    assert project.live == "v1"


def test_record_trained_version_after_heads_that_came_meanwhile_goes_live(
    project: Versioned,
) -> None:
    project.record("v1-live", parent=None, kind="live_head")
    project.record("v2-live", parent="v1-live", kind="live_head")
    # Its training began before the first head, or with it.
    for name, parent in (("v3", None), ("v4", "v1-live")):
        assert project.record(name, parent=parent).promote
        assert project.live == name
        project.versions.promote(project.id, "v2-live")


def test_record_live_head_after_a_training_that_came_meanwhile_is_not_promoted(
    project: Versioned,
) -> None:
    project.record("v1-live", parent=None, kind="live_head")
    project.record("v2", parent="v1-live", revision=4)
    late = project.record("v3-live", parent="v1-live", revision=9, kind="live_head")
    assert (late.promote, late.reason.code) == (False, Code.OVERTAKEN)
    assert project.live == "v2"
    # A head is no training: what it saw is still to be trained on.
    assert project.row.trained_revision == 4


def test_best_is_named_by_the_live_version_and_survives_pruning(project: Versioned) -> None:
    project.record("v1", parent=None, best="v1")
    for number in range(2, 7):
        project.record(f"v{number}", parent=project.live, best="v1")
    assert project.versions.best(project.id) == "v1"
    project.versions.prune(project.id, keep=1)
    assert _stored(project) == ["v1", "v5", "v6"]
    # A version that somebody took back is no measure for others.
    project.versions.promote(project.id, "v1")
    project.versions.rollback(project.id, "v6")
    assert project.versions.best(project.id) is None


def test_record_worse_version_after_a_rollback_keeps_its_verdict(project: Versioned) -> None:
    project.add("v1")
    project.add("v2")
    project.versions.rollback(project.id)
    assert project.record("v3", WORSE, parent="v2", revision=9) == WORSE
    assert project.row.trained_revision == 9


def test_rollback_goes_by_when_versions_were_live_not_by_their_age(project: Versioned) -> None:
    for name in ("v1", "v2", "v3"):
        project.add(name)
    project.versions.promote(project.id, "v1")
    project.versions.promote(project.id, "v2")
    assert project.versions.rollback(project.id) == "v1"
    assert project.versions.rollback(project.id) == "v3"


def test_rollback_to_a_named_version_makes_it_live(project: Versioned) -> None:
    for name in ("v1", "v2", "v3"):
        project.add(name)
    assert project.versions.rollback(project.id, to="v1") == "v1"
    assert project.states() == {"v1": "live", "v2": "retired", "v3": "rolled back"}
    # A version that was rolled back may be named as well.
    assert project.versions.rollback(project.id, to="v3") == "v3"
    assert project.states() == {"v1": "rolled back", "v2": "retired", "v3": "live"}
    assert project.live == "v3"


def test_rollback_impossible_says_why_and_changes_nothing(project: Versioned) -> None:
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


def test_rollback_and_promote_missing_artefact_is_refused(project: Versioned) -> None:
    project.add("v1")
    project.add("v2")
    project.artefacts.remove(KEY, "v1")
    for attempt in (
        lambda: project.versions.rollback(project.id),
        lambda: project.versions.rollback(project.id, to="v1"),
        lambda: project.versions.promote(project.id, "v1"),
    ):
        with pytest.raises(VersionMissing, match=r"version v1 is not in .*: restore the folder"):
            attempt()
    assert project.live == "v2"
    assert project.states() == {"v1": "retired", "v2": "live"}


def test_promote_version_of_another_project_is_refused(project: Versioned) -> None:
    project.add("v1")
    other = Ingest(project.database).introduce("2.1795463889", 2, label_config="<View/>").id
    with pytest.raises(VersionMissing, match=r"project 2\.1795463889 has no version v1"):
        project.versions.promote(other, "v1")
    assert project.versions.all(other) == []
    assert project.live == "v1"


def test_promote_many_at_once_leaves_exactly_one_live(project: Versioned) -> None:
    names = [f"v{i}" for i in range(1, 9)]
    for name in names:
        project.add(name, WORSE)
    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(project.versions.promote, project.id, name) for name in names * 3]:
            done.result()
    assert project.live in names
    assert sorted(project.states().values()) == ["live"] + ["retired"] * 7


def test_prune_keeps_the_live_the_one_before_and_the_newest(project: Versioned) -> None:
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


def test_prune_keeps_old_versions_that_an_admin_went_back_to(project: Versioned) -> None:
    for name in ("v1", "v2", "v3", "v4"):
        project.add(name)
    project.versions.rollback(project.id, to="v1")
    # Live is v1, and before it, of those that were not rolled back, v3.
    assert project.versions.prune(project.id, 1) == ["v2"]
    assert _stored(project) == ["v1", "v3", "v4"]


def test_promote_version_being_pruned_is_refused(project: Versioned) -> None:
    for name in ("v1", "v2", "v3"):
        project.add(name)
    tried: list[str] = []

    class Slow(ArtefactStore):
        """Promotes, as somebody may, before the folder is gone."""

        def remove(self, project_key: str, version: str) -> None:
            with pytest.raises(VersionMissing, match=f"{version} was deleted to make room"):
                project.versions.promote(project.id, version)
            with pytest.raises(VersionMissing, match=f"{version} was deleted to make room"):
                project.versions.rollback(project.id, to=version)
            tried.append(version)
            super().remove(project_key, version)

    assert Versions(project.database, Slow(project.folder)).prune(project.id, 1) == ["v1"]
    assert tried == ["v1"]
    assert project.live == "v3"


def test_rollback_to_a_pruned_version_is_refused(project: Versioned) -> None:
    for name in ("v1", "v2", "v3"):
        project.add(name)
    assert project.versions.prune(project.id, 1) == ["v1"]
    with pytest.raises(VersionMissing, match="version v1 was deleted to make room"):
        project.versions.rollback(project.id, to="v1")
    project.versions.rollback(project.id)
    with pytest.raises(VersionMissing, match="no earlier version"):
        project.versions.rollback(project.id)
    assert project.live == "v2"
