"""What a store's transactions say, in SQL."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from umbel.server.schema import (
    audit_table,
    checkpoint_table,
    dispatch_table,
    metric_table,
    privacy_table,
    round_table,
    run_table,
)

if TYPE_CHECKING:  # torch is loaded only where tensors are read or written
    from umbel.server.records import RoundRecord

KEPT = 2
"""Checkpoints that stay: the last, and the one to go back to should the last be damaged."""


def create(connection: sa.Connection, row: Mapping[str, Any]) -> None:
    """Enters a run."""
    connection.execute(sa.insert(run_table).values(dict(row)))


def update(connection: sa.Connection, run_id: str, values: Mapping[str, Any]) -> None:
    """Changes columns of a run."""
    connection.execute(sa.update(run_table).where(run_table.c.id == run_id).values(dict(values)))


def enter(
    connection: sa.Connection,
    run_id: str,
    rounds: Sequence[RoundRecord],
    name: str,
    sha256: str,
) -> set[str]:
    """Enters ``rounds``, the last of which has the checkpoint ``name``.

    Returns:
        the names of the checkpoint files that are still needed.
    Raises:
        ValueError: a round between the last committed one and these is missing.
    """
    last = rounds[-1].round
    this = run_table.c.id == run_id
    done = connection.execute(sa.select(run_table.c.rounds_done).where(this)).scalar_one()
    # Entered already where an interrupt fell between the transaction and its caller's next line.
    new = [r for r in rounds if r.round > done]
    if [r.round for r in new] != list(range(done + 1, last + 1)):
        raise ValueError(f"run {run_id}: round {done + 1} was never committed")
    rows = [{"run_id": run_id, "round": r.round, "record": json.dumps(r.as_json())} for r in new]
    if rows:
        connection.execute(sa.insert(round_table), rows)
    kept = [row.file for row in checkpoints(connection, run_id)]
    mine = checkpoint_table.c.run_id == run_id
    if name in kept:
        again = sa.update(checkpoint_table).where(mine, checkpoint_table.c.file == name)
        connection.execute(again.values(sha256=sha256))
    else:
        row = {"run_id": run_id, "round": last, "file": name, "sha256": sha256}
        connection.execute(sa.insert(checkpoint_table), row)
        kept.insert(0, name)
    if gone := kept[KEPT:]:
        connection.execute(
            sa.delete(checkpoint_table).where(mine, checkpoint_table.c.file.in_(gone))
        )
    seconds = run_table.c.seconds + sum(r.seconds for r in new)
    connection.execute(sa.update(run_table).where(this).values(rounds_done=last, seconds=seconds))
    return set(kept[:KEPT])


def drop_after(connection: sa.Connection, run_id: str, last: int) -> None:
    """Takes back every round after ``last``."""
    for table in (round_table, checkpoint_table, dispatch_table, metric_table, privacy_table):
        after = sa.and_(table.c.run_id == run_id, table.c.round > last)
        connection.execute(sa.delete(table).where(after))
    seconds = sum(record["seconds"] for record in records(connection, run_id))
    indexed = sa.case((run_table.c.indexed > last, last), else_=run_table.c.indexed)
    values = {"rounds_done": last, "seconds": seconds, "indexed": indexed}
    update(connection, run_id, values)


def checkpoints(connection: sa.Connection, run_id: str) -> Sequence[sa.Row[Any, Any, Any]]:
    """(round, file, sha256) of the checkpoints that are kept, the last first."""
    columns = (checkpoint_table.c.round, checkpoint_table.c.file, checkpoint_table.c.sha256)
    query = sa.select(*columns).where(checkpoint_table.c.run_id == run_id)
    return connection.execute(query.order_by(checkpoint_table.c.round.desc())).all()


def records(
    connection: sa.Connection, run_id: str, after: int = 0, most: int | None = None
) -> list[dict[str, Any]]:
    """The committed rounds after round ``after``, at most ``most``, as plain values, in order."""
    mine = (round_table.c.run_id == run_id, round_table.c.round > after)
    query = sa.select(round_table.c.record).where(*mine)
    rows = connection.execute(query.order_by(round_table.c.round).limit(most)).scalars()
    return [json.loads(text) for text in rows]


def runs(connection: sa.Connection) -> Sequence[Mapping[str, Any]]:
    """Every run with the ``record`` of its last committed round, the newest first."""
    last = sa.and_(
        round_table.c.run_id == run_table.c.id, round_table.c.round == run_table.c.rounds_done
    )
    query = sa.select(run_table, round_table.c.record).outerjoin_from(run_table, round_table, last)
    newest = query.order_by(run_table.c.started.desc(), run_table.c.id.desc())
    return [dict(row) for row in connection.execute(newest).mappings()]


def note(
    connection: sa.Connection, actor: str, event: str, run_id: str = "", **facts: object
) -> None:
    """Enters who did what; entries are never changed."""
    row = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "actor": actor,
        "event": event,
        "run_id": run_id,
        "facts": json.dumps(facts),
    }
    connection.execute(sa.insert(audit_table), row)


def notes(connection: sa.Connection, last: int) -> list[dict[str, Any]]:
    """The last entries of :func:`note`, the newest first."""
    query = sa.select(audit_table).order_by(audit_table.c.number.desc()).limit(last)
    rows = connection.execute(query).mappings()
    return [{**row, "facts": json.loads(row["facts"])} for row in rows]
