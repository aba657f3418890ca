"""Rows for whoever looks at runs: who was asked, what was measured, what was spent.

They follow from the records of committed rounds, so they come after the commit, in a thread of
their own: a run does not wait for them. ``run.indexed`` says how far they are; who is killed
between loses nothing, and the next to write the run makes up for it.

A simulation's clients can be so many that their rows outgrow everything else: beyond
:data:`MOST_ROWS` its participants are in its records alone; failures are always here.
"""

from __future__ import annotations

import logging
import math
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from umbel.core.errors import UmbelError
from umbel.server import journal
from umbel.server.database import Database
from umbel.server.schema import dispatch_table, metric_table, privacy_table, run_table

PAUSE = 1.0
"""Seconds from a commit to its rows: quick rounds share a transaction."""

BATCH, MOST_ROUNDS = 4_000, 200
"""Rows and rounds of one transaction, more or less: others wait for it."""

MOST_ROWS = 20_000
"""Dispatches of one simulation."""

REAL_SITES = "deployment"
"""The engine whose clients are as many as have signed a contract."""

log = logging.getLogger("umbel.server")

# A fork must not split off while a thread is inside SQLite: its copy of SQLite's lock would never
# be released.
_writing = threading.RLock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_writing.acquire,
        after_in_parent=_writing.release,
        after_in_child=_writing.release,
    )


class Dispatch(NamedTuple):
    """What a real site was sent in a round, and when it had answered.

    Args:
        round: 1 … rounds.
        client: who.
        sent: seconds since 1970.
        done: the same; ``None``: it has not answered.
        bytes_down: sent to it.
        bytes_up: received from it.
    """

    round: int
    client: str
    sent: float
    done: float | None
    bytes_down: int
    bytes_up: int


class Index:
    """Writes the rows of the runs of one store. One that nobody wakes has no thread."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._behind: set[str] = set()
        self._told: dict[str, list[dict[str, Any]]] = {}
        self._told_lock = threading.Lock()
        self._wake, self._closing = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._process = os.getpid()

    def wake(self, run_id: str) -> None:
        """A round of this run was committed."""
        if self._process != os.getpid():  # a fork has no thread
            self._process, self._thread = os.getpid(), None
            self._wake, self._closing = threading.Event(), threading.Event()
            self._told_lock = threading.Lock()
        self._behind.add(run_id)
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="run-index", daemon=True)
            self._thread.start()
        self._wake.set()

    def catch_up(self, run_id: str) -> None:
        """Writes all rows that are missing; what fails is logged, and comes with the next."""
        self._behind.discard(run_id)
        try:
            with _writing:
                with self._told_lock:
                    told = self._told.pop(run_id, [])
                if told:
                    with self._database.write() as connection:
                        known = ("sent", "done", "bytes_down", "bytes_up")
                        _put(connection, dispatch_table, told, known)
                while not _advance(self._database, run_id):
                    pass
        except UmbelError as error:
            log.warning("the rows of run %s wait: %s", run_id, error)

    def keep(self, run_id: str, dispatches: Sequence[Dispatch]) -> None:
        """Takes what is known of dispatches; a kill before it is written loses it."""
        rows = [{"run_id": run_id, **dispatch._asdict()} for dispatch in dispatches]
        with self._told_lock:
            self._told.setdefault(run_id, []).extend(rows)
        self.wake(run_id)

    def close(self) -> None:
        """Ends the thread, and writes what it has not."""
        if self._process != os.getpid():
            return
        self._closing.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
        self._thread = None
        self._closing.clear()
        for run_id in list(self._behind):
            self.catch_up(run_id)

    def _work(self) -> None:
        while not self._closing.is_set():
            self._wake.wait()
            self._wake.clear()
            for run_id in list(self._behind):
                self.catch_up(run_id)
            self._closing.wait(PAUSE)


def _advance(database: Database, run_id: str) -> bool:
    """Writes some rows that are missing; whether none is any more."""
    with database.write() as connection:
        mine = run_table.c.id == run_id
        columns = (run_table.c.indexed, run_table.c.rounds_done, run_table.c.engine)
        query = sa.select(*columns).where(mine).with_for_update()
        indexed, done, engine = connection.execute(query).one()
        if indexed >= done:
            return True
        room = math.inf if engine == REAL_SITES else MOST_ROWS - _count(connection, run_id)
        dispatches: list[dict[str, Any]] = []
        metrics: list[dict[str, Any]] = []
        spent: list[dict[str, Any]] = []
        for record in journal.records(connection, run_id, indexed, most=MOST_ROUNDS):
            key = {"run_id": run_id, "round": record["round"]}
            whole = len(record["participants"]) <= room - len(dispatches)
            dispatches += _dispatches(key, record, whole)
            metrics += _metrics(key, record, whole)
            if record.get("epsilon") is not None:
                spent.append({**key, "epsilon": record["epsilon"]})
            indexed = record["round"]
            if len(dispatches) + len(metrics) > BATCH:
                break
        _put(connection, dispatch_table, dispatches, ("status", "reason"))
        _put(connection, metric_table, metrics, ("value",))
        _put(connection, privacy_table, spent, ("epsilon",))
        connection.execute(sa.update(run_table).where(mine).values(indexed=indexed))
        return bool(indexed >= done)


def _count(connection: sa.Connection, run_id: str) -> int:
    count = sa.select(sa.func.count()).select_from(dispatch_table)
    return int(connection.execute(count.where(dispatch_table.c.run_id == run_id)).scalar_one())


def _dispatches(
    key: Mapping[str, Any], record: Mapping[str, Any], whole: bool
) -> Iterator[dict[str, Any]]:
    capped = set(record.get("capped", ()))
    for client in record["participants"] if whole else ():
        status = "capped" if client in capped else "done"
        yield {**key, "client": client, "status": status, "reason": ""}
    for client, reason in {f["client"]: f["reason"] for f in record["failures"]}.items():
        if not whole or client not in record["participants"]:
            yield {**key, "client": client, "status": "failed", "reason": reason}


def _metrics(
    key: Mapping[str, Any], record: Mapping[str, Any], whole: bool
) -> Iterator[dict[str, Any]]:
    scopes = [("global", "", record["metrics"]), ("training", "", record["training"])]
    if whole:
        scopes += [("client", name, m) for name, m in record.get("per_client", {}).items()]
    for scope, client, values in scopes:
        for name, value in values.items():
            yield {**key, "scope": scope, "client": client, "name": name, "value": value}


def _put(
    connection: sa.Connection,
    table: sa.Table,
    rows: Iterable[Mapping[str, Any]],
    changed: Sequence[str],
) -> None:
    """Inserts rows; of those that are there, ``changed`` columns."""
    rows = list(rows)
    if not rows:
        return
    key = [column.name for column in table.primary_key]
    if connection.dialect.name == "sqlite":
        lite = sqlite.insert(table)
        on_lite = lite.on_conflict_do_update(
            index_elements=key, set_={n: lite.excluded[n] for n in changed}
        )
        connection.execute(on_lite, rows)
    else:
        post = postgresql.insert(table)
        on_post = post.on_conflict_do_update(
            index_elements=key, set_={n: post.excluded[n] for n in changed}
        )
        connection.execute(on_post, rows)
