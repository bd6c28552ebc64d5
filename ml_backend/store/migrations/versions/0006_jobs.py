"""Jobs: runs and claims, shards, checkpoints apart from payloads, reasons as data.

Revision ID: 0006
"""

import json

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

_jobs = sa.table(
    "jobs",
    sa.column("id", sa.Integer),
    sa.column("kind", sa.String),
    sa.column("state", sa.String),
    sa.column("reason", sa.Text),
    sa.column("payload", sa.JSON),
    sa.column("checkpoint", sa.JSON),
)
_versions = sa.table("model_versions", sa.column("id", sa.Integer), sa.column("reason", sa.Text))
_PROGRESS = ("version", "cursor", "done", "imported", "left_out", "example", "newest_task")
"""What an auto-labelling's payload held of its progress."""


def upgrade() -> None:
    with op.batch_alter_table("jobs") as jobs:
        jobs.add_column(sa.Column("parent_id", sa.Integer(), nullable=True))
        jobs.add_column(sa.Column("run", sa.Integer(), nullable=False, server_default="0"))
        jobs.add_column(sa.Column("claim", sa.String(length=32), nullable=True))
        jobs.add_column(sa.Column("host", sa.String(length=128), nullable=True))
        jobs.add_column(sa.Column("checkpoint", sa.JSON(), nullable=False, server_default="{}"))
        jobs.create_foreign_key("fk_jobs_parent", "jobs", ["parent_id"], ["id"], ondelete="CASCADE")
        jobs.create_index("ix_jobs_parent", ["parent_id"])
    connection = op.get_bind()
    for table in (_jobs, _versions):
        for number, reason in connection.execute(sa.select(table.c.id, table.c.reason)).all():
            words = json.dumps({"code": "plain", "values": {"text": reason}})
            connection.execute(sa.update(table).where(table.c.id == number).values(reason=words))
    connection.execute(sa.update(_jobs).where(_jobs.c.kind == "tidy").values(kind="remove_stale"))
    rows = connection.execute(sa.select(_jobs.c.id, _jobs.c.kind, _jobs.c.payload)).all()
    for number, kind, payload in rows:
        if kind == "autolabel":
            checkpoint = {name: payload[name] for name in _PROGRESS if name in payload}
            values = {"payload": {}, "checkpoint": checkpoint}
        elif kind == "predict":
            # The tasks that were left become what is asked for.
            values = {"payload": {"tasks": payload.get("tasks", [])}, "checkpoint": {}}
        elif kind == "train":
            values = {"payload": {}, "checkpoint": payload}
        else:
            continue
        connection.execute(sa.update(_jobs).where(_jobs.c.id == number).values(**values))


def downgrade() -> None:
    raise NotImplementedError("restore the copy that was made before the upgrade")
