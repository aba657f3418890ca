"""Rows for whoever looks: dispatches, metrics, privacy; checkpoints, audit, users of their own."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Adds the tables; the rows of old runs are made when their run is next written or shown."""
    op.add_column("run", sa.Column("indexed", sa.Integer, nullable=False, server_default="0"))
    op.create_table(
        "checkpoint",
        *_round_key(),
        sa.Column("file", sa.Text, nullable=False),
        sa.Column("sha256", sa.Text, nullable=False),
    )
    op.execute(
        "INSERT INTO checkpoint (run_id, round, file, sha256) "
        "SELECT run_id, round, checkpoint, sha256 FROM round WHERE checkpoint IS NOT NULL"
    )
    with op.batch_alter_table("round") as table:
        table.drop_column("checkpoint")
        table.drop_column("sha256")
    op.create_table(
        "dispatch",
        *_round_key(),
        sa.Column("client", sa.Text, primary_key=True),
        sa.Column("sent", sa.Float),
        sa.Column("done", sa.Float),
        sa.Column("bytes_down", sa.Integer),
        sa.Column("bytes_up", sa.Integer),
        sa.Column("status", sa.Text, nullable=False, server_default="sent"),
        sa.Column("reason", sa.Text, nullable=False, server_default=""),
    )
    op.create_index("dispatch_client", "dispatch", ["client"])
    op.create_table(
        "metric",
        *_round_key(),
        sa.Column("scope", sa.Text, primary_key=True),
        sa.Column("client", sa.Text, primary_key=True),
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("value", sa.Float),
    )
    op.create_table("privacy", *_round_key(), sa.Column("epsilon", sa.Float, nullable=False))
    op.create_table(
        "audit",
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column("time", sa.Text, nullable=False),
        sa.Column("actor", sa.Text, nullable=False),
        sa.Column("event", sa.Text, nullable=False),
        sa.Column("run_id", sa.Text, nullable=False, server_default=""),
        sa.Column("facts", sa.Text, nullable=False, server_default="{}"),
    )
    op.create_table(
        "user",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("role", sa.Text, nullable=False),
        sa.Column("password", sa.Text, nullable=False),
        sa.Column("created", sa.Text, nullable=False),
    )
    op.create_table(
        "token",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("user", sa.Text, sa.ForeignKey("user.name", ondelete="CASCADE"), nullable=False),
        sa.Column("label", sa.Text, nullable=False),
        sa.Column("sha256", sa.Text, nullable=False, unique=True),
        sa.Column("created", sa.Text, nullable=False),
    )


def _round_key() -> list[sa.Column[object]]:
    return [
        sa.Column("run_id", sa.Text, sa.ForeignKey("run.id"), primary_key=True),
        sa.Column("round", sa.Integer, primary_key=True, autoincrement=False),
    ]
