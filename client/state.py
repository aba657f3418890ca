"""What clients keep from round to round: a version a round, atomic on disk, one file a run.

A client reads its newest version from before the round, so that a round that is repeated, after a
kill or a resume, reads what it read the first time. Versions that no repetition can ask for are
dropped when their client writes a new one.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from umbel.core import sqlite
from umbel.core.errors import InputError, RunError
from umbel.core.payloads import pack, unpack
from umbel.core.trees import Tree

GIB = 1 << 30
LIMIT = 16 * GIB
"""Bytes that the file may take, unless told otherwise."""

LARGEST = 999_999_999
"""Bytes of one client's tensors: what SQLite takes in one piece."""

WAIT = 120.0
"""Seconds that a writer waits for another one of this machine."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS own (
    client TEXT NOT NULL, round INTEGER NOT NULL, tensors BLOB NOT NULL,
    UNIQUE (client, round)
);
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
"""


class ClientStates:
    """The clients' tensors of one run, in the file at ``path``; made when first written.

    Several processes may use one file at once, each through its own copy of this object: pickled
    or forked, it opens the file anew.

    Args:
        path: of the SQLite file, in a folder of the run.
        algorithm: whose tensors they are; a file of another's is refused.
        limit: bytes that the file may take.
        durable: whether each :meth:`put` outlasts a power failure by itself. Where not, the next
            :meth:`settle` makes it.
    """

    def __init__(
        self, path: Path, algorithm: str, *, limit: int = LIMIT, durable: bool = False
    ) -> None:
        self.path = path
        self._algorithm = algorithm
        self._limit = limit
        self._durable = durable
        self._open: tuple[tuple[int, int], sqlite3.Connection] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": None}

    def get(self, round_number: int, clients: Sequence[str]) -> list[dict[str, Tensor] | None]:
        """Each client's newest tensors from before the round; ``None``: there are none.

        Raises:
            RunError: the file is damaged, or another algorithm's.
        """
        if not self.path.exists():
            return [None] * len(clients)
        found: list[dict[str, Tensor] | None] = []
        with self._translated():
            connection = self._connection()
            for client in clients:
                row = connection.execute(
                    "SELECT tensors FROM own WHERE client = ? AND round < ? "
                    "ORDER BY round DESC LIMIT 1",
                    (client, round_number),
                ).fetchone()
                found.append(None if row is None else self._unpacked(client, row[0]))
        return found

    def put(self, round_number: int, states: Mapping[str, Tree]) -> None:
        """Keeps what clients have after the round: all of them, or none where that fails.

        Raises:
            RunError: they would take more than the limit, or the disk is full.
        """
        documents = {client: pack(tree) for client, tree in states.items()}
        for client, document in documents.items():
            if len(document) > LARGEST:
                raise RunError(
                    f"client '{client}' would keep {len(document):,} bytes, and one client can "
                    f"keep {LARGEST:,}",
                    where=str(self.path),
                    fix="use a smaller model or adapter, or a strategy without client state",
                )
        with self._translated(), self._transaction() as connection:
            last = connection.execute("SELECT value FROM facts WHERE name = 'before'").fetchone()
            before = 0 if last is None else int(last[0])
            for client, document in documents.items():
                connection.execute(
                    "DELETE FROM own WHERE client = ?1 AND (round >= ?2 OR round < "
                    "(SELECT MAX(round) FROM own WHERE client = ?1 AND round <= ?3))",
                    (client, round_number, before),
                )
                connection.execute(
                    "INSERT INTO own VALUES (?, ?, ?)", (client, round_number, document)
                )
            self._check_size(connection)

    def settle(self, round_number: int) -> None:
        """Makes all that was put outlast a power failure; to be called before a round is committed.

        From now on the run may go back to this round, or to the one that was settled before it.
        """
        with self._translated(), self._transaction(full=True) as connection:
            now = connection.execute("SELECT value FROM facts WHERE name = 'now'").fetchone()
            earlier = 0 if now is None else min(int(now[0]), round_number)
            if now is None or int(now[0]) < round_number:
                _keep(connection, before=earlier, now=round_number)

    def rewind(self, round_number: int) -> None:
        """Drops what came after a round: the run goes on from there.

        Raises:
            RunError: what clients had then is gone.
        """
        if not self.path.exists():
            return
        with self._translated(), self._transaction(full=True) as connection:
            row = connection.execute("SELECT value FROM facts WHERE name = 'before'").fetchone()
            before = 0 if row is None else int(row[0])
            if round_number < before:
                raise RunError(
                    f"what clients kept in round {round_number} is gone; the oldest is of round "
                    f"{before}",
                    where=str(self.path),
                    fix="start the run anew",
                )
            connection.execute("DELETE FROM own WHERE round > ?", (round_number,))
            _keep(connection, before=before, now=round_number)

    def size(self) -> int:
        """What the clients' tensors take in the file."""
        if not self.path.exists():
            return 0
        with self._translated():
            return _used(self._connection())

    def close(self) -> None:
        """Closes the file."""
        if self._open is not None and self._open[0] == _here():
            self._open[1].close()
        self._open = None

    def _unpacked(self, client: str, document: bytes) -> dict[str, Tensor]:
        try:
            return unpack(document)[0]
        except InputError:
            raise RunError(
                f"what client '{client}' kept is damaged",
                where=str(self.path),
                fix="restore the file from a backup, or start the run anew",
            ) from None

    def _check_size(self, connection: sqlite3.Connection) -> None:
        if (used := _used(connection)) > self._limit:
            raise RunError(
                f"clients would keep {used / GIB:.3g} GiB, and the limit is "
                f"{self._limit / GIB:.3g} GiB",
                where=str(self.path),
                fix="set [client] state_gib higher, or use a smaller cohort, model or strategy",
            )

    def _connection(self) -> sqlite3.Connection:
        # A connection must not be used by a fork, nor by another thread.
        if self._open is None or self._open[0] != _here():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            made = sqlite3.connect(self.path, timeout=WAIT, isolation_level=None)
            sqlite.prepare(made, "FULL" if self._durable else "NORMAL", write_ahead=True, wait=WAIT)
            with closing(made.cursor()) as cursor:
                cursor.execute("BEGIN IMMEDIATE")
                for statement in _SCHEMA.split(";"):
                    cursor.execute(statement)
                cursor.execute(
                    "INSERT OR IGNORE INTO facts VALUES ('algorithm', ?)", (self._algorithm,)
                )
                [found] = cursor.execute(
                    "SELECT value FROM facts WHERE name = 'algorithm'"
                ).fetchone()
                cursor.execute("COMMIT")
            if found != self._algorithm:
                made.close()
                raise RunError(
                    f"clients keep the tensors of '{found}', and this run is of "
                    f"'{self._algorithm}'",
                    where=str(self.path),
                    fix="start a run of its own",
                )
            self._open = (_here(), made)
        return self._open[1]

    @contextmanager
    def _transaction(self, full: bool = False) -> Iterator[sqlite3.Connection]:
        connection = self._connection()
        if full and not self._durable:
            connection.execute("PRAGMA synchronous = FULL")
        try:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
            connection.execute("COMMIT")
        finally:
            if full and not self._durable:
                connection.execute("PRAGMA synchronous = NORMAL")

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise RunError(
                f"cannot keep what clients have: {error}",
                where=str(self.path),
                fix="is the disk full, or the file damaged?",
            ) from error


def _keep(connection: sqlite3.Connection, **facts: int) -> None:
    for name, value in facts.items():
        connection.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, str(value)))


def _used(connection: sqlite3.Connection) -> int:
    pages, free, size = (
        connection.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("page_count", "freelist_count", "page_size")
    )
    return int((pages - free) * size)


def _here() -> tuple[int, int]:
    return os.getpid(), threading.get_ident()
