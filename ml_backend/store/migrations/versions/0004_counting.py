"""Indexes of what is counted: annotations to learn from, deleted tasks.

Revision ID: 0004
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index(
        "ix_annotations_live",
        "annotations",
        ["project_id", "task_id"],
        sqlite_where=sa.text("deleted_at IS NULL AND was_cancelled IS 0"),
        postgresql_where=sa.text("deleted_at IS NULL AND was_cancelled IS false"),
    )
    op.create_index(
        "ix_tasks_deleted",
        "tasks",
        ["project_id", "label_studio_id"],
        sqlite_where=sa.text("deleted_at IS NOT NULL"),
        postgresql_where=sa.text("deleted_at IS NOT NULL"),
    )


def downgrade() -> None:
    op.drop_index("ix_annotations_live")
    op.drop_index("ix_tasks_deleted")
