"""Running totals of audits, and the mark that annotations are to be read back.

An audit keeps what its annotation contributes to the totals, so that a changed or deleted
annotation can be taken out of them. `audit_basis` stays empty: the worker sums all up once.

Revision ID: 0007
"""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def _audits() -> sa.TableClause:
    names = ("annotation_id", "version", "accepted", "moved", "relabelled", "deleted")
    added = ("standing", "unaided", "lead_time", "annotated_at")
    return sa.table("audits", *map(sa.column, (*names, *added)))


def _annotations() -> sa.TableClause:
    names = ("id", "deleted_at", "was_cancelled", "lead_time", "parent_prediction", "created_at")
    return sa.table("annotations", *map(sa.column, names))


def upgrade() -> None:
    op.add_column("projects", sa.Column("unread_since", sa.DateTime(timezone=True), nullable=True))
    op.add_column("projects", sa.Column("audit_basis", sa.String(length=200), nullable=True))
    op.add_column(
        "audits",
        sa.Column("standing", sa.Boolean(), nullable=False, server_default=sa.true()),
    )
    op.add_column(
        "audits",
        sa.Column("unaided", sa.Boolean(), nullable=False, server_default=sa.false()),
    )
    op.add_column("audits", sa.Column("lead_time", sa.Float(), nullable=True))
    op.add_column("audits", sa.Column("annotated_at", sa.DateTime(timezone=True), nullable=True))
    audits, annotations = _audits(), _annotations()
    of_audit = annotations.c.id == audits.c.annotation_id

    def of_annotation(value: sa.ColumnElement[Any]) -> sa.ScalarSelect[Any]:
        return sa.select(value).where(of_audit).scalar_subquery()

    counts = audits.c
    predicted = counts.accepted + counts.moved + counts.relabelled + counts.deleted
    by_nobody = audits.c.version.is_(None) & of_annotation(
        annotations.c.parent_prediction.is_(None)
    )
    op.execute(
        audits.update().values(
            standing=of_annotation(
                annotations.c.deleted_at.is_(None) & annotations.c.was_cancelled.is_(False)
            ),
            lead_time=of_annotation(annotations.c.lead_time),
            annotated_at=of_annotation(annotations.c.created_at),
            unaided=sa.func.coalesce(
                (predicted == 0) & ((audits.c.version == "untrained") | by_nobody), sa.false()
            ),
        )
    )
    op.create_table(
        "audit_totals",
        sa.Column("project_id", sa.Integer(), nullable=False),
        sa.Column("began", sa.String(length=8), nullable=False),
        sa.Column("version", sa.String(length=128), nullable=False),
        *(
            sa.Column(name, sa.Integer(), nullable=False)
            for name in (
                *("annotations", "accepted", "moved", "relabelled", "deleted", "added"),
                *("timed", "timed_boxes"),
            )
        ),
        sa.Column("milliseconds", sa.BigInteger(), nullable=False),
        sa.Column("times", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("project_id", "began", "version"),
    )


def downgrade() -> None:
    op.drop_table("audit_totals")
    for table, names in (
        ("audits", ("standing", "unaided", "lead_time", "annotated_at")),
        ("projects", ("unread_since", "audit_basis")),
    ):
        with op.batch_alter_table(table) as altered:
            for name in names:
                altered.drop_column(name)
