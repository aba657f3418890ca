"""What a store's transactions say, in SQL."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from umbel.server.database import round_table, run_table

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
    mine = round_table.c.run_id == run_id
    names = {"checkpoint": name, "sha256": sha256}
    connection.execute(sa.update(round_table).where(mine, round_table.c.round == last), names)
    found = checkpoints(connection, run_id)
    for row in found[KEPT:]:
        gone = sa.update(round_table).where(mine, round_table.c.round == row.round)
        connection.execute(gone, {"checkpoint": None, "sha256": None})
    seconds = run_table.c.seconds + sum(r.seconds for r in new)
    connection.execute(sa.update(run_table).where(this).values(rounds_done=last, seconds=seconds))
    return {row.checkpoint for row in found[:KEPT]}


def drop_after(connection: sa.Connection, run_id: str, last: int) -> None:
    """Takes back every round after ``last``."""
    mine = round_table.c.run_id == run_id
    connection.execute(sa.delete(round_table).where(mine, round_table.c.round > last))
    seconds = sum(record["seconds"] for record in records(connection, run_id))
    update(connection, run_id, {"rounds_done": last, "seconds": seconds})


def checkpoints(connection: sa.Connection, run_id: str) -> Sequence[sa.Row[Any, Any, Any]]:
    """(round, checkpoint, sha256) of the rounds that have a checkpoint, the last first."""
    columns = (round_table.c.round, round_table.c.checkpoint, round_table.c.sha256)
    query = sa.select(*columns).where(round_table.c.run_id == run_id)
    query = query.where(round_table.c.checkpoint.is_not(None))
    return connection.execute(query.order_by(round_table.c.round.desc())).all()


def records(connection: sa.Connection, run_id: str) -> list[dict[str, Any]]:
    """The committed rounds as plain values, in order."""
    query = sa.select(round_table.c.record).where(round_table.c.run_id == run_id)
    rows = connection.execute(query.order_by(round_table.c.round)).scalars()
    return [json.loads(text) for text in rows]


def runs(connection: sa.Connection) -> Sequence[Mapping[str, Any]]:
    """Every run with the ``record`` of its last committed round, the newest first."""
    last = sa.and_(
        round_table.c.run_id == run_table.c.id, round_table.c.round == run_table.c.rounds_done
    )
    query = sa.select(run_table, round_table.c.record).outerjoin_from(run_table, round_table, last)
    newest = query.order_by(run_table.c.started.desc(), run_table.c.id.desc())
    return [dict(row) for row in connection.execute(newest).mappings()]
