"""Defines the tables of projects, tasks, annotations, jobs, versions and audits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any, ClassVar

from sqlalchemy import (
    JSON,
    BigInteger,
    DateTime,
    ForeignKey,
    Index,
    String,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.engine import Dialect
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeDecorator

from ml_backend.reasons import Reason
from ml_backend.store.states import JobKind, JobState, Trigger, VersionState


def now() -> datetime:
    """Returns the present moment, in UTC."""
    return datetime.now(UTC)


LabelStudioId = Annotated[int, mapped_column(BigInteger)]
"""An id that Label Studio gave."""


class UTCDateTime(TypeDecorator[datetime]):
    """A moment in UTC, timezone-aware on both databases (SQLite keeps no zone)."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is not None and value.tzinfo is None:
            raise ValueError("a moment without a time zone cannot be stored")
        return value.astimezone(UTC) if value is not None else None

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return value.replace(tzinfo=UTC) if value is not None and value.tzinfo is None else value


class PlainText(TypeDecorator[str]):
    """Text as both databases hold it: PostgreSQL knows no NUL, so it is left out."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        return value.replace("\0", "") if value is not None else None


class ReasonText(TypeDecorator[Reason]):
    """A reason, as the JSON text of its code and values."""

    impl = PlainText
    cache_ok = True

    def process_bind_param(self, value: Reason | None, dialect: Dialect) -> str | None:
        return None if value is None else json.dumps(value.as_dict())

    def process_result_value(self, value: str | None, dialect: Dialect) -> Reason | None:
        return None if value is None else Reason.of(json.loads(value))


class Name(TypeDecorator[StrEnum]):
    """A member of an enumeration, as its text.

    Args:
        members: the enumeration.
    """

    impl = String
    cache_ok = True

    def __init__(self, members: type[StrEnum]) -> None:
        super().__init__(16)
        self.members = members

    def process_bind_param(self, value: StrEnum | None, dialect: Dialect) -> str | None:
        return None if value is None else str(value)

    def process_result_value(self, value: str | None, dialect: Dialect) -> StrEnum | None:
        return None if value is None else self.members(value)


class Base(DeclarativeBase):
    """Declares the types that columns share."""

    type_annotation_map: ClassVar = {
        datetime: UTCDateTime(),
        dict[str, Any]: JSON(),
        list[Any]: JSON(),
    }


UNTRAINED = "untrained"
"""The version of a project before its first."""
PRETRAINED = "untrained-coco"
"""The version of a project before its first, where COCO's detector stands in."""


class Project(Base):
    """A project of some Label Studio.

    `key` is `"{id}.{creation as unix seconds}"`, as Label Studio itself sends it: an id alone
    does not identify a project where one backend serves several Label Studios.
    """

    __tablename__ = "projects"

    id: Mapped[int] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(String(64), unique=True)
    label_studio_id: Mapped[LabelStudioId] = mapped_column(index=True)
    title: Mapped[str] = mapped_column(PlainText, default="")
    label_config: Mapped[str] = mapped_column(PlainText, default="")
    described_at: Mapped[datetime | None]
    """When title and label config were as they stand here: what is older does not replace them."""
    url: Mapped[str | None] = mapped_column(PlainText)
    """Where its Label Studio said it is (`/setup`), and the token that came with it."""
    token: Mapped[str | None] = mapped_column(PlainText)
    is_default: Mapped[bool | None]
    """Whether the Label Studio of the settings holds the project; None until it was asked."""
    connection_url: Mapped[str | None] = mapped_column(PlainText)
    """Our address, as `connect` told it to Label Studio."""
    live_version: Mapped[str | None] = mapped_column(String(128))
    revision: Mapped[int] = mapped_column(default=0)
    """Counts the changes of its annotations."""
    trained_revision: Mapped[int] = mapped_column(default=0)
    """The revision that the newest training saw."""
    changed_at: Mapped[datetime | None]
    """When an annotation last changed."""
    heard_at: Mapped[datetime | None]
    """When a webhook last arrived."""
    reconciled_at: Mapped[datetime | None]
    """Label Studio's time up to which changes were read back over the API."""
    unread_since: Mapped[datetime | None]
    """Since when Label Studio is known to hold annotations that are not stored here, because it
    reported another number of them. None once all were read back."""
    audit_basis: Mapped[str | None] = mapped_column(String(200))
    """The costs, and the time of the first version, by which its `AuditTotal`s were summed."""
    created_at: Mapped[datetime] = mapped_column(default=now)

    @property
    def version(self) -> str:
        """Names the version that the project's predictions carry, by the database."""
        return self.live_version or UNTRAINED


class Task(Base):
    """A task of a project, as far as it was heard of."""

    __tablename__ = "tasks"
    __table_args__ = (
        UniqueConstraint("project_id", "label_studio_id"),
        Index(
            "ix_tasks_deleted",
            *("project_id", "label_studio_id"),
            sqlite_where=text("deleted_at IS NOT NULL"),
            postgresql_where=text("deleted_at IS NOT NULL"),
        ),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    project_id: Mapped[int] = mapped_column(ForeignKey("projects.id", ondelete="CASCADE"))
    label_studio_id: Mapped[LabelStudioId]
    data: Mapped[dict[str, Any]]
    updated_at: Mapped[datetime | None]
    deleted_at: Mapped[datetime | None]
    fingerprint: Mapped[str | None] = mapped_column(String(64))
    """Perceptual hash of its image, hexadecimal."""
    clip: Mapped[LabelStudioId | None]
    """Task (`label_studio_id`) that stands for all its near-duplicates."""
    side: Mapped[str | None] = mapped_column(String(8))
    """`train` or `holdout`; once set, it never changes."""


class Annotation(Base):
    """An annotation. A deleted one stays as a tombstone, so that a late event cannot revive it."""

    __tablename__ = "annotations"
    __table_args__ = (
        UniqueConstraint("project_id", "label_studio_id"),
        Index("ix_annotations_task", "project_id", "task_id"),
        Index("ix_annotations_revision", "project_id", "revision"),
        # What is counted after every change: without it all regions would be read for that.
        Index(
            "ix_annotations_live",
            *("project_id", "task_id"),
            sqlite_where=text("deleted_at IS NULL AND was_cancelled IS 0"),
            postgresql_where=text("deleted_at IS NULL AND was_cancelled IS false"),
        ),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    project_id: Mapped[int] = mapped_column(ForeignKey("projects.id", ondelete="CASCADE"))
    label_studio_id: Mapped[LabelStudioId]
    task_id: Mapped[LabelStudioId | None]
    """Label Studio's id of the task; unknown for a tombstone heard of before its annotation."""
    result: Mapped[list[Any]]
    was_cancelled: Mapped[bool] = mapped_column(default=False)
    ground_truth: Mapped[bool] = mapped_column(default=False)
    lead_time: Mapped[float | None]
    parent_prediction: Mapped[LabelStudioId | None]
    completed_by: Mapped[LabelStudioId | None]
    created_at: Mapped[datetime | None]
    updated_at: Mapped[datetime | None]
    received_at: Mapped[datetime] = mapped_column(default=now)
    deleted_at: Mapped[datetime | None]
    revision: Mapped[int] = mapped_column(default=0)


class Audit(Base):
    """What a person made of the prediction that an annotation started from, in boxes."""

    __tablename__ = "audits"
    __table_args__ = (Index("ix_audits_project_version", "project_id", "version"),)

    annotation_id: Mapped[int] = mapped_column(
        ForeignKey("annotations.id", ondelete="CASCADE"), primary_key=True
    )
    project_id: Mapped[int] = mapped_column(ForeignKey("projects.id", ondelete="CASCADE"))
    revision: Mapped[int]
    """The annotation's, when this was counted: a later one is counted anew."""
    version: Mapped[str | None] = mapped_column(String(128))
    """The model version whose prediction it started from; None where it began with nothing, or the
    prediction was gone before it was counted."""
    blind: Mapped[bool] = mapped_column(default=False)
    """Whether the task is one of those that are shown without boxes, to compare with."""
    accepted: Mapped[int] = mapped_column(default=0)
    """Boxes left as they were predicted."""
    moved: Mapped[int] = mapped_column(default=0)
    """Boxes moved or resized."""
    relabelled: Mapped[int] = mapped_column(default=0)
    """Boxes that got another label (moved as well, or not)."""
    deleted: Mapped[int] = mapped_column(default=0)
    """Predicted boxes that are gone."""
    added: Mapped[int] = mapped_column(default=0)
    """Boxes drawn by hand."""
    standing: Mapped[bool] = mapped_column(default=True)
    """Whether the annotation was neither deleted nor skipped when this was counted."""
    unaided: Mapped[bool] = mapped_column(default=False)
    """Whether it began with nothing, or with a prediction without boxes of no version of ours."""
    lead_time: Mapped[float | None]
    """The annotation's, and"""
    annotated_at: Mapped[datetime | None]
    """its creation, as they were when this was counted."""


class AuditTotal(Base):
    """The sums of a project's audits that began alike, of one version.

    Changed in the transaction that changes the audits: a scrape of `/metrics` reads a few of these
    instead of every audit.
    """

    __tablename__ = "audit_totals"

    project_id: Mapped[int] = mapped_column(
        ForeignKey("projects.id", ondelete="CASCADE"), primary_key=True
    )
    began: Mapped[str] = mapped_column(String(8), primary_key=True)
    """`boxes` (a version's prediction), `blind` (kept without boxes), or `early` (before the first
    version)."""
    version: Mapped[str] = mapped_column(String(128), primary_key=True)
    """The model version; empty where they began with nothing."""
    annotations: Mapped[int] = mapped_column(default=0)
    accepted: Mapped[int] = mapped_column(default=0)
    moved: Mapped[int] = mapped_column(default=0)
    relabelled: Mapped[int] = mapped_column(default=0)
    deleted: Mapped[int] = mapped_column(default=0)
    added: Mapped[int] = mapped_column(default=0)
    timed: Mapped[int] = mapped_column(default=0)
    """Annotations whose time is known,"""
    timed_boxes: Mapped[int] = mapped_column(default=0)
    """the boxes that these ended up with,"""
    milliseconds: Mapped[int] = mapped_column(BigInteger, default=0)
    """and the time that they took, cut off where a page was left open: integers, so that what is
    subtracted leaves no rounding error."""
    times: Mapped[dict[str, Any]] = mapped_column(default=dict)
    """How many of them took each time, in seconds of three significant digits."""


class Contact(Base):
    """How a Label Studio answered of late, whichever of our processes asked."""

    __tablename__ = "contacts"

    url: Mapped[str] = mapped_column(Text, primary_key=True)
    answered_at: Mapped[datetime | None]
    """When it last did what was asked, to half a minute."""
    failing_since: Mapped[datetime | None]
    """Since when it has not; None while it does."""
    failure: Mapped[str] = mapped_column(String(32), default="")
    """The kind of failure, as `/metrics` names it; empty while it does what is asked."""
    detail: Mapped[str] = mapped_column(Text, default="")
    """The same in words."""


class Job(Base):
    """Work that was asked for, what became of it, and why.

    The queue decides which worker runs a job and when; a row holds what people see of it, and the
    claim of the run that may write to it.
    """

    __tablename__ = "jobs"
    __table_args__ = (
        Index("ix_jobs_project_state", "project_id", "state"),
        Index("ix_jobs_parent", "parent_id"),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    project_id: Mapped[int] = mapped_column(ForeignKey("projects.id", ondelete="CASCADE"))
    parent_id: Mapped[int | None] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    """The auto-labelling that a shard belongs to."""
    kind: Mapped[JobKind] = mapped_column(Name(JobKind))
    state: Mapped[JobState] = mapped_column(Name(JobState))
    reason: Mapped[Reason] = mapped_column(ReasonText, default=Reason("none"))
    trigger: Mapped[Trigger] = mapped_column(Name(Trigger))
    progress: Mapped[float] = mapped_column(default=0.0)
    attempt: Mapped[int] = mapped_column(default=0)
    run: Mapped[int] = mapped_column(default=0)
    """Counts how often the job was put into the queue; an older entry of the queue does nothing."""
    claim: Mapped[str | None] = mapped_column(String(32))
    """The run that may write; None while no worker has the job."""
    host: Mapped[str | None] = mapped_column(String(128))
    """The host whose worker has, or had, the job."""
    payload: Mapped[dict[str, Any]] = mapped_column(default=dict, deferred=True)
    """What was asked for; written once. It may be large, so it is read only where it is needed."""
    checkpoint: Mapped[dict[str, Any]] = mapped_column(default=dict)
    """How far the job is, for the run that goes on with it."""
    version: Mapped[str | None] = mapped_column(String(128))
    not_before: Mapped[datetime | None]
    created_at: Mapped[datetime] = mapped_column(default=now)
    started_at: Mapped[datetime | None]
    heartbeat_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]


class ModelVersion(Base):
    """A detector that was trained for a project; its artefact lies in the artefact store."""

    __tablename__ = "model_versions"
    __table_args__ = (UniqueConstraint("project_id", "name"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    project_id: Mapped[int] = mapped_column(ForeignKey("projects.id", ondelete="CASCADE"))
    name: Mapped[str] = mapped_column(String(128))
    state: Mapped[VersionState] = mapped_column(Name(VersionState))
    reason: Mapped[Reason] = mapped_column(ReasonText, default=Reason("none"))
    card: Mapped[dict[str, Any]]
    parent: Mapped[str | None] = mapped_column(String(128))
    created_at: Mapped[datetime] = mapped_column(default=now)
    promoted_at: Mapped[datetime | None]


def is_live_head(card: Mapping[str, Any]) -> bool:
    """Tells from its card whether a version is a live head, and was not trained."""
    return card.get("kind") == JobKind.LIVE_HEAD
