"""The store's tables. Migrations lead from every earlier form to this one."""

from __future__ import annotations

import sqlalchemy as sa

VERSION = "0002"
"""The last migration."""

metadata = sa.MetaData()

run_table = sa.Table(
    "run",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("status", sa.Text, nullable=False),
    sa.Column("engine", sa.Text, nullable=False),
    sa.Column("started", sa.Text, nullable=False),
    sa.Column("finished", sa.Text),
    sa.Column("seconds", sa.Float, nullable=False),
    sa.Column("rounds_planned", sa.Integer, nullable=False),
    sa.Column("rounds_done", sa.Integer, nullable=False),
    sa.Column("configuration", sa.Text, nullable=False),
    sa.Column("versions", sa.Text, nullable=False),
    sa.Column("engine_plan", sa.Text, nullable=False),
    sa.Column("error", sa.Text, nullable=False),
    sa.Column("pid", sa.Integer, nullable=False),
    sa.Column("host", sa.Text, nullable=False),
    # Rounds whose rows are in dispatch, metric and privacy: they come after the commit.
    sa.Column("indexed", sa.Integer, nullable=False, server_default="0"),
)

round_table = sa.Table(
    "round",
    metadata,
    sa.Column("run_id", sa.Text, sa.ForeignKey("run.id"), primary_key=True),
    sa.Column("round", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("record", sa.Text, nullable=False),
)

checkpoint_table = sa.Table(
    "checkpoint",
    metadata,
    sa.Column("run_id", sa.Text, sa.ForeignKey("run.id"), primary_key=True),
    sa.Column("round", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("file", sa.Text, nullable=False),
    sa.Column("sha256", sa.Text, nullable=False),
)

# What a client was asked in a round, and how it ended. ``sent`` and ``done`` in seconds since 1970,
# and the bytes, are known of real sites alone.
dispatch_table = sa.Table(
    "dispatch",
    metadata,
    sa.Column("run_id", sa.Text, sa.ForeignKey("run.id"), primary_key=True),
    sa.Column("round", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("client", sa.Text, primary_key=True),
    sa.Column("sent", sa.Float),
    sa.Column("done", sa.Float),
    sa.Column("bytes_down", sa.Integer),
    sa.Column("bytes_up", sa.Integer),
    sa.Column("status", sa.Text, nullable=False, server_default="sent"),
    sa.Column("reason", sa.Text, nullable=False, server_default=""),
    sa.Index("dispatch_client", "client"),
)

# ``scope``: "global" (of the model), "training" (means over participants) or "client".
metric_table = sa.Table(
    "metric",
    metadata,
    sa.Column("run_id", sa.Text, sa.ForeignKey("run.id"), primary_key=True),
    sa.Column("round", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("scope", sa.Text, primary_key=True),
    sa.Column("client", sa.Text, primary_key=True),
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("value", sa.Float),
)

privacy_table = sa.Table(
    "privacy",
    metadata,
    sa.Column("run_id", sa.Text, sa.ForeignKey("run.id"), primary_key=True),
    sa.Column("round", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("epsilon", sa.Float, nullable=False),
)

audit_table = sa.Table(
    "audit",
    metadata,
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("time", sa.Text, nullable=False),
    sa.Column("actor", sa.Text, nullable=False),
    sa.Column("event", sa.Text, nullable=False),
    sa.Column("run_id", sa.Text, nullable=False, server_default=""),
    sa.Column("facts", sa.Text, nullable=False, server_default="{}"),
)

user_table = sa.Table(
    "user",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("role", sa.Text, nullable=False),
    sa.Column("password", sa.Text, nullable=False),
    sa.Column("created", sa.Text, nullable=False),
)

token_table = sa.Table(
    "token",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("user", sa.Text, sa.ForeignKey("user.name", ondelete="CASCADE"), nullable=False),
    sa.Column("label", sa.Text, nullable=False),
    sa.Column("sha256", sa.Text, nullable=False, unique=True),
    sa.Column("created", sa.Text, nullable=False),
)
