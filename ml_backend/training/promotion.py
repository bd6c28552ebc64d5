"""Decides which version of a project is live."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from ml_backend.reasons import Code, Reason, reason
from ml_backend.store.artefacts import ArtefactStore, VersionMissing
from ml_backend.store.database import Database
from ml_backend.store.states import VersionState
from ml_backend.store.tables import ModelVersion, Project, is_live_head, now

if TYPE_CHECKING:
    from ml_backend.detection.evaluation import Comparison, Evaluation

_log = logging.getLogger(__name__)

TIE = 0.005
"""Mean AP50 by which a version of another recipe may be behind the live one: half a point is
noise."""
UNLIKELY = 0.25
"""Probability of being better than the live head below which a training has failed. Ten images say
little: of one that may as well be better, the corrections of people tell more."""
BEHIND_WITH_MORE = 0.02
"""Mean AP50 by which a version that finds a new label may be behind, even where the evidence says
so: earlier images lack the boxes of this label, which costs the other labels a little, and people
wait for it."""
BEHIND_BEST = 0.02
"""Mean AP50 by which a version may be behind the best one that the same hold-out has measured: ten
steps back of half a point each, none of them certain, would be five points."""
BAD_FALL = 0.15
"""AP50 by which no class with enough boxes may fall."""
ENOUGH_BOXES = 20
"""Boxes of a class in the hold-out from which its AP50 counts."""
FINDS_SOMETHING = 0.1
"""Mean AP50 that the first version needs; below, correcting its boxes costs more than drawing."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Says whether a version goes live, and why."""

    promote: bool
    reason: Reason


def judge(
    evaluation: Evaluation,
    comparison: Comparison | None,
    live: str | None,
    added: Sequence[str] = (),
    *,
    same_recipe: bool = True,
    live_head: Comparison | None = None,
    best: tuple[str, Comparison] | None = None,
    needed: float = FINDS_SOMETHING,
) -> Verdict:
    """Decides whether a new version goes live.

    More data by the same recipe is presumed to be better: such a version is refused where the
    evidence says that it is worse, and not where it fails to show that it is better. A version of
    another recipe than the live one has to be as good.

    Args:
        evaluation: quality of the new version on the hold-out, or out of fold.
        comparison: new minus live, paired over the same images, in the mean over the labels that
            the live version knows; None where nothing is live.
        live: name of the live version.
        added: labels that the live version does not know.
        same_recipe: whether the live version was made as the new one was, from less data.
        live_head: new minus a live head that saw the same images; None where there is none.
        best: the best version that a hold-out has measured where that is not the live one, and
            new minus best on the present hold-out.
        needed: mean AP50 that a first version needs.
    """
    score = evaluation.map50
    if live_head is not None and live_head.delta < 0 and live_head.probability_better < UNLIKELY:
        return Verdict(False, reason(Code.WORSE_THAN_LIVE_HEAD, **_change(live_head)))
    if comparison is None or live is None:
        if score < needed:
            return Verdict(False, reason(Code.FIRST_VERSION_WEAK, ap50=score, needed=needed))
        return Verdict(True, reason(Code.FIRST_VERSION, ap50=score))
    change = {"live": live, **_change(comparison)}
    found = {
        label: ap50
        for label in added
        if (ap50 := evaluation.per_class[label].ap50 or 0.0) >= FINDS_SOMETHING
    }
    is_worse = comparison.high < 0 if same_recipe else comparison.delta < -TIE
    if is_worse and not (found and comparison.delta >= -BEHIND_WITH_MORE):
        return Verdict(False, reason(Code.WORSE, **change))
    for label, of_label in comparison.per_class.items():
        if of_label.support >= ENOUGH_BOXES and of_label.delta < -BAD_FALL:
            return Verdict(
                False, reason(Code.LABEL_FALLS, label=label, fall=-of_label.delta, **change)
            )
    if best is not None and not found and best[1].delta < -BEHIND_BEST:
        return Verdict(False, reason(Code.BEHIND_BEST, best=best[0], **_change(best[1])))
    if is_worse:
        return Verdict(True, reason(Code.FINDS_NEW_LABEL, found=found, **change))
    return Verdict(True, reason(Code.NOT_WORSE, **change))


def _change(comparison: Comparison) -> dict[str, float]:
    return {"delta": comparison.delta, "low": comparison.low, "high": comparison.high}


class Versions:
    """Keeps a project's model versions, and which of them is live.

    Args:
        database: holds the versions.
        artefacts: holds their files.
    """

    def __init__(self, database: Database, artefacts: ArtefactStore) -> None:
        self._database = database
        self._artefacts = artefacts

    def record(
        self,
        session: Session,
        project_id: int,
        name: str,
        card: dict[str, Any],
        verdict: Verdict,
        *,
        parent: str | None,
        revision: int,
    ) -> Verdict:
        """Enters a new version, and makes it live where the verdict says so.

        A rollback or a promotion during the training holds: the new version does not go live where
        the live version is no longer the one that it was compared with. The annotations that it saw
        then still count as changed, so that the next training follows soon.

        Args:
            session: the transaction that enters the version.
            project_id: the project.
            name: of the new version.
            card: of the new version.
            verdict: whether it should go live, and why.
            parent: the version that it was compared with, or None.
            revision: revision of the project that the training saw.

        Returns:
            The verdict that was stored.
        """
        project = session.get_one(Project, project_id, with_for_update=True)
        if verdict.promote and self._is_overtaken(session, project, card, parent):
            verdict = Verdict(
                False, reason(Code.OVERTAKEN, live=project.live_version, parent=parent)
            )
        elif not is_live_head(card):
            project.trained_revision = max(project.trained_revision, revision)
        session.add(
            ModelVersion(
                project_id=project_id,
                name=name,
                state=VersionState.REJECTED,
                reason=verdict.reason,
                card=card,
                parent=parent,
            )
        )
        session.flush()
        if verdict.promote:
            _make_live(session, project, name, verdict.reason)
        return verdict

    def promote(self, project_id: int, name: str) -> None:
        """Makes a version live because somebody asked for it.

        Raises:
            VersionMissing: it does not exist, or its artefact is gone.
        """
        with self._database.session() as session:
            project = session.get_one(Project, project_id, with_for_update=True)
            self._check(session, project, name)
            _make_live(session, project, name, reason(Code.PROMOTED_ON_REQUEST))

    def rollback(
        self,
        project_id: int,
        to: str | None = None,
        *,
        only_from: str | None = None,
        why: Reason | None = None,
    ) -> str:
        """Makes an earlier version live at once; answers its name.

        The version that was live is marked as rolled back, and never goes live again by itself.

        Args:
            project_id: the project.
            to: the version to go back to; by default the one that was live before.
            only_from: the version that must be live; any where not given.
            why: the reason; by default that somebody asked for it.

        Raises:
            VersionMissing: there is no such version, or its artefact is gone.
        """
        with self._database.session() as session:
            project = session.get_one(Project, project_id, with_for_update=True)
            target = to or self._previous(session, project)
            if target is None:
                raise VersionMissing(f"project {project.key} has no earlier version to go back to")
            self._check(session, project, target)
            left = project.live_version
            if only_from not in (None, left):
                raise VersionMissing(f"{left} is live by now, and not {only_from}")
            if target == left:
                raise VersionMissing(f"{target} is live already")
            _make_live(session, project, target, reason(Code.ROLLED_BACK_FROM, version=left))
            session.execute(
                update(ModelVersion)
                .where(ModelVersion.project_id == project_id, ModelVersion.name == left)
                .values(
                    state=VersionState.ROLLED_BACK,
                    reason=why or reason(Code.ROLLED_BACK_TO, version=target),
                )
            )
            return target

    def all(self, project_id: int) -> list[ModelVersion]:
        """Reads the project's versions, newest first."""
        with self._database.reading() as session:
            return list(
                session.scalars(
                    select(ModelVersion)
                    .where(ModelVersion.project_id == project_id)
                    .order_by(ModelVersion.id.desc())
                )
            )

    def count(self, project_id: int) -> int:
        """Counts all versions that the project has had."""
        return len(self.all(project_id))

    def best(self, project_id: int) -> str | None:
        """Names the best version that a hold-out has measured; None where there is none.

        The card of each such version names it: itself, where it was not behind the best before it.
        No version that went live has learned the hold-out, so that all of them can be compared on
        it.
        """
        with self._database.reading() as session:
            project = session.get_one(Project, project_id)
            return self._best(session, project)

    def prune(self, project_id: int, keep: int) -> list[str]:
        """Deletes the artefacts of old versions; answers the names of these versions.

        The live version, the one that a rollback would make live, and the `keep` newest stay.
        """
        with self._database.session() as session:
            project = session.get_one(Project, project_id, with_for_update=True)
            versions = session.scalars(
                select(ModelVersion)
                .where(
                    ModelVersion.project_id == project_id, ModelVersion.state != VersionState.PRUNED
                )
                .order_by(ModelVersion.id.desc())
            ).all()
            # Later versions are compared with the best one.
            kept = {
                project.live_version,
                self._previous(session, project),
                self._best(session, project),
            }
            kept |= {v.name for v in versions[:keep]}
            doomed = [v for v in versions if v.name not in kept]
            for version in doomed:
                version.state = VersionState.PRUNED
            key = project.key
        for version in doomed:
            self._artefacts.remove(key, version.name)
        return [v.name for v in doomed]

    def remove_unrecorded(self, project_id: int) -> None:
        """Deletes what killed processes left of a project in the artefact store.

        That is: half-written artefacts, the artefacts of trainings that were killed before their
        version was recorded, and artefacts that `prune` did not come to delete. Call it only while
        no training of the project runs. Logs a warning where the store cannot be used.
        """
        with self._database.reading() as session:
            project = session.get_one(Project, project_id)
            recorded = session.scalars(
                select(ModelVersion.name).where(
                    ModelVersion.project_id == project_id, ModelVersion.state != VersionState.PRUNED
                )
            ).all()
        try:
            self._artefacts.sweep(project.key)
            removed = self._artefacts.remove_unrecorded(
                project.key, set(recorded), project.created_at
            )
        except OSError as error:
            _log.warning("project %s: artefacts are cleaned up later: %s", project.key, error)
            return
        if removed:
            _log.info("project %s: deleted unrecorded artefacts: %s", project.key, removed)

    @staticmethod
    def _is_overtaken(
        session: Session, project: Project, card: dict[str, Any], parent: str | None
    ) -> bool:
        """Tells whether another version is live than the one that a version was compared with.

        Live heads come and go during a training, which was compared with one that had learned the
        same images as itself.
        """
        if project.live_version == parent:
            return False
        versions = session.scalars(
            select(ModelVersion).where(
                ModelVersion.project_id == project.id,
                ModelVersion.name.in_([project.live_version, parent]),
            )
        )
        heads = {version.name for version in versions if is_live_head(version.card)}
        follows_head = parent is None or parent in heads
        return is_live_head(card) or not (follows_head and project.live_version in heads)

    def _check(self, session: Session, project: Project, name: str) -> None:
        known = session.scalar(
            select(ModelVersion).where(
                ModelVersion.project_id == project.id, ModelVersion.name == name
            )
        )
        if known is None:
            raise VersionMissing(
                f"project {project.key} has no version {name}: `ml-backend versions` lists them"
            )
        if known.state == VersionState.PRUNED:
            # The version's folder is deleted after this state is stored, and may still be there.
            raise VersionMissing(
                f"version {name} was deleted to make room (ML_BACKEND_KEEP_VERSIONS): "
                "`ml-backend versions` lists what there is"
            )
        self._artefacts.check(project.key, name)

    @staticmethod
    def _best(session: Session, project: Project) -> str | None:
        cards = select(ModelVersion).where(ModelVersion.project_id == project.id)
        live = session.scalar(cards.where(ModelVersion.name == project.live_version))
        name = live.card.get("best") if live is not None else None
        best = session.scalar(cards.where(ModelVersion.name == name)) if name else None
        served = (VersionState.LIVE, VersionState.RETIRED)
        return best.name if best is not None and best.state in served else None

    @staticmethod
    def _previous(session: Session, project: Project) -> str | None:
        return session.scalar(
            select(ModelVersion.name)
            .where(
                ModelVersion.project_id == project.id,
                ModelVersion.state == VersionState.RETIRED,
                ModelVersion.name != project.live_version,
            )
            .order_by(ModelVersion.promoted_at.desc())
            .limit(1)
        )


def _make_live(session: Session, project: Project, name: str, why: Reason) -> None:
    session.execute(
        update(ModelVersion)
        .where(ModelVersion.project_id == project.id, ModelVersion.state == VersionState.LIVE)
        .values(state=VersionState.RETIRED)
    )
    session.execute(
        update(ModelVersion)
        .where(ModelVersion.project_id == project.id, ModelVersion.name == name)
        .values(state=VersionState.LIVE, reason=why, promoted_at=now())
    )
    project.live_version = name
    _log.info("project %s: %s is live (%s)", project.key, name, why.code)


def counts_of(card: Mapping[str, Any]) -> dict[str, int]:
    """Reads from a version's card the number of boxes of each label that it was trained on."""
    return {str(k): int(v) for k, v in card.get("data", {}).get("boxes", {}).items()}
