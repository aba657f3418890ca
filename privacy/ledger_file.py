"""The ledger on disk: one SQLite file that is only ever appended to.

A rollback journal with ``synchronous=EXTRA``: a committed line survives a power cut, the file can
be copied by itself, and network disks will do. Connections are opened for each transaction, so a
forked process never shares one. Triggers refuse to change or delete lines, and each line carries a
digest over all before it: who edits the file with other tools is found out by ``verify``, and who
cuts off its end by comparing the last digest with the one in a run's record.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import sqlalchemy as sa
from sqlalchemy.pool import NullPool

from umbel.core import sqlite
from umbel.core.errors import InputError, RunError
from umbel.privacy.entries import Entry, Line, chain, read

SCHEMA = 1
BUSY_SECONDS = 60
FIRST = bytes(32)

_metadata = sa.MetaData()

_about = sa.Table(
    "about",
    _metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("value", sa.Text, nullable=False),
)

_terms = sa.Table(
    "terms",
    _metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("mechanism", sa.Text, nullable=False),
    sa.Column("text", sa.Text, nullable=False, unique=True),
)

_KEY = ("run", "round", "client", "purpose", "attempt")

_line = sa.Table(
    "line",
    _metadata,
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("seconds", sa.Integer, nullable=False),
    sa.Column("run", sa.Text, nullable=False),
    sa.Column("round", sa.Integer, nullable=False),
    sa.Column("client", sa.Text, nullable=False),
    sa.Column("purpose", sa.Text, nullable=False),
    sa.Column("attempt", sa.Text, nullable=False),
    sa.Column("steps", sa.Integer, nullable=False),
    sa.Column("terms", sa.Integer, sa.ForeignKey("terms.id"), nullable=False),
    sa.Column("digest", sa.LargeBinary, nullable=False),
    sa.UniqueConstraint(*_KEY),
    sqlite_autoincrement=True,
)

_refusal = sa.Table(
    "refusal",
    _metadata,
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("seconds", sa.Integer, nullable=False),
    sa.Column("place", sa.Text, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
)


class Spending(NamedTuple):
    """How often a mechanism ran for a client, summed over some lines; the mechanism as text."""

    client: str
    mechanism: str
    steps: int


class LedgerFile:
    """The file at ``path``, made when it is missing, readable by its owner alone.

    Args:
        path: of the file; its folder exists.
        about: name -> value: what the ledger is of. The same each time that it is opened.

    Raises:
        InputError: the file is another ledger's, of a newer Umbel, or cannot be written.
    """

    def __init__(self, path: Path, about: dict[str, str]) -> None:
        self.path = path
        self._engine = sa.create_engine(
            f"sqlite:///{path}",
            poolclass=NullPool,
            connect_args={"timeout": BUSY_SECONDS, "isolation_level": None},
        )
        sa.event.listen(self._engine, "connect", lambda raw, _: _prepare(raw))
        try:
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        except OSError as error:
            raise InputError(
                f"cannot write the ledger: {error.strerror}",
                where=str(path),
                fix="use a folder that is there and that you may write",
            ) from error
        with self.write() as connection:
            self._begin(connection, about)

    def _begin(self, connection: sa.Connection, about: dict[str, str]) -> None:
        wanted = {"schema": str(SCHEMA), **about}
        if not sa.inspect(connection).has_table("about"):
            _metadata.create_all(connection)
            for table, verb in ((t, v) for t in ("line", "terms") for v in ("UPDATE", "DELETE")):
                connection.exec_driver_sql(
                    f"CREATE TRIGGER no_{verb.lower()}_{table} BEFORE {verb} ON {table} "
                    "BEGIN SELECT RAISE(ABORT, 'the ledger is only appended to'); END"
                )
            rows = [{"name": name, "value": value} for name, value in wanted.items()]
            connection.execute(_about.insert(), rows)
        query = sa.select(_about.c.name, _about.c.value)
        found = {row.name: row.value for row in connection.execute(query)}
        for name, value in wanted.items():
            if found.get(name) != value:
                raise InputError(
                    f"the ledger has {name} '{found.get(name)}', not '{value}'",
                    where=str(self.path),
                    fix="give each site, data-set version and unit of privacy its own ledger",
                )

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """A connection that sees what is committed.

        Raises:
            RunError: the file is damaged, or another process kept it locked for a minute.
        """
        with self._translated(), self._engine.connect() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """One transaction, alone in the file: durable at the end of the block, or undone.

        Raises:
            RunError: as :meth:`read`; or the disk is full. Nothing was written.
        """
        with self._translated(), self._engine.begin() as connection:
            # At once, not at the first change: what is read here is still so when it is written.
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            yield connection

    def spending(self, connection: sa.Connection, after: int) -> tuple[int, list[Spending]]:
        """The last line's number, and what the lines after number ``after`` spend."""
        last = connection.execute(sa.select(sa.func.max(_line.c.number))).scalar() or 0
        query = (
            sa.select(_line.c.client, _terms.c.mechanism, sa.func.sum(_line.c.steps))
            .join(_terms)
            .where(_line.c.number > after, _line.c.number <= last)
            .group_by(_line.c.client, _terms.c.mechanism)
        )
        return last, [Spending(*row) for row in connection.execute(query)]

    def standing(
        self, connection: sa.Connection, entries: Sequence[Entry]
    ) -> dict[tuple[str, int, str, str, str], Entry]:
        """Key -> the entry that stands under it, for all of the rounds of ``entries``."""
        found = {}
        for run, round_number in {(e.run, e.round) for e in entries}:
            query = (
                sa.select(_line, _terms.c.text)
                .join(_terms)
                .where(_line.c.run == run, _line.c.round == round_number)
            )
            for row in connection.execute(query):
                key = (row.run, row.round, row.client, row.purpose, row.attempt)
                found[key] = read(key, row.steps, row.text)
        return found

    def append(
        self, connection: sa.Connection, entries: Sequence[tuple[Entry, str]], seconds: int
    ) -> None:
        """Appends entries, each with its mechanism as text."""
        digest = self.head(connection)
        known: dict[str, int] = {}
        rows = []
        for entry, mechanism in entries:
            text = entry.terms
            if text not in known:
                known[text] = self._terms_id(connection, mechanism, text)
            digest = chain(digest, seconds, entry)
            row = dict(zip(_KEY, entry.key, strict=True))
            rows.append(
                {**row, "steps": entry.steps, "terms": known[text]}
                | {"seconds": seconds, "digest": digest}
            )
        if rows:
            connection.execute(_line.insert(), rows)

    def refuse(self, connection: sa.Connection, place: str, reason: str, seconds: int) -> None:
        """Notes a refusal; it spends nothing."""
        connection.execute(
            _refusal.insert(), {"seconds": seconds, "place": place, "reason": reason}
        )

    def refusals(self, connection: sa.Connection) -> list[dict[str, object]]:
        """Every refusal, oldest first."""
        query = sa.select(_refusal).order_by(_refusal.c.number)
        return [dict(row) for row in connection.execute(query).mappings()]

    def head(self, connection: sa.Connection) -> bytes:
        """The digest of the last line; zeros where there is none."""
        query = sa.select(_line.c.digest).order_by(_line.c.number.desc()).limit(1)
        digest: bytes | None = connection.execute(query).scalar()
        return FIRST if digest is None else digest

    def lines(self, connection: sa.Connection) -> Iterator[Line]:
        """Every line, oldest first."""
        query = sa.select(_line, _terms.c.text).join(_terms).order_by(_line.c.number)
        for row in connection.execute(query):
            key = (row.run, row.round, row.client, row.purpose, row.attempt)
            entry = read(key, row.steps, row.text)
            yield Line(row.number, row.seconds, entry, row.digest)

    def _terms_id(self, connection: sa.Connection, mechanism: str, text: str) -> int:
        query = sa.select(_terms.c.id).where(_terms.c.text == text)
        found = connection.execute(query).scalar()
        if found is None:
            row = {"mechanism": mechanism, "text": text}
            (found,) = connection.execute(_terms.insert(), row).inserted_primary_key or (0,)
        return int(found)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sa.exc.DatabaseError as error:
            raise RunError(
                f"the ledger failed, and nothing may be released: {error.orig}",
                where=str(self.path),
                fix="check the disk, and that no process holds the file; then resume",
            ) from error


def described(path: Path) -> dict[str, str]:
    """What the ledger at ``path`` is of: its owner, unit and relation.

    Raises:
        InputError: there is no ledger.
    """
    wrong = InputError("not a ledger", where=str(path), fix="name the file that Umbel wrote")
    if not path.is_file():
        raise wrong
    engine = sa.create_engine(f"sqlite:///{path}", poolclass=NullPool)
    try:
        with engine.connect() as connection:
            query = sa.select(_about.c.name, _about.c.value)
            return {row.name: row.value for row in connection.execute(query)}
    except sa.exc.DatabaseError:
        raise wrong from None


def _prepare(raw: sa.engine.interfaces.DBAPIConnection) -> None:
    sqlite.prepare(raw, "EXTRA", write_ahead=False, wait=BUSY_SECONDS, foreign_keys=True)
