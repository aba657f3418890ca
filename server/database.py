"""Where the store's tables are: an SQLite file, or a PostgreSQL database.

Both survive power cuts and take several writers. A new database gets the tables of
:mod:`umbel.server.schema`; one of an earlier Umbel is migrated when it is first opened.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import sqlalchemy as sa

from umbel.core import sqlite
from umbel.core.errors import InputError, RunError, UmbelError
from umbel.server.schema import VERSION, metadata

BUSY_SECONDS = 30

FIRST = "0001"
SCHEMA = 2
"""Of an SQLite file, so that an Umbel from before migrations refuses it by name."""

MIGRATING = 0x756D6265
"""PostgreSQL's advisory lock of whoever makes or migrates the tables."""


class Place(NamedTuple):
    """Where a store is.

    Args:
        folder: of run files, checkpoints and models.
        url: of the database.
        shown: the same for messages: without a password.
    """

    folder: Path
    url: sa.URL
    shown: str

    @property
    def file(self) -> Path | None:
        """The SQLite file; ``None``: the database is elsewhere."""
        sqlite_file = self.url.get_backend_name() == "sqlite"
        return Path(str(self.url.database)) if sqlite_file else None


class Database:
    """The database at ``place``: made by the first :meth:`write`, opened when first asked.

    SQLite: WAL lets readers look while a run writes; ``synchronous=FULL`` makes a committed round
    durable.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        self._engine: sa.Engine | None = None

    def exists(self) -> bool:
        """Whether anything was ever written; a database elsewhere is asked when it is read."""
        return self.place.file is None or self.place.file.is_file()

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """A connection that sees what is committed.

        Raises:
            UmbelError: the file is damaged, not a database, or of a newer Umbel; the server of the
                database does not answer.
        """
        with self._translated(), self._connected().connect() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """One transaction: committed at the end of the block, undone by an exception.

        Raises:
            UmbelError: as :meth:`read`; or the disk is full, the file cannot be written, or another
                process kept it locked for half a minute.
        """
        with self._translated(), self._connected().begin() as connection:
            _begin(connection)
            yield connection

    def close(self) -> None:
        """Closes the file."""
        if self._engine is not None:
            self._engine.dispose()
            self._engine = None

    @contextmanager
    def _translated(self) -> Iterator[None]:
        with translated(self.place.file or self.place.shown):
            yield

    def _connected(self) -> sa.Engine:
        if self._engine is None:
            engine = _engine(self.place)
            with engine.connect() as connection:
                found = _version(connection)
            if found != VERSION:
                with engine.begin() as connection:
                    _begin(connection)
                    _bring_up(connection, self.place)
            self._engine = engine
        return self._engine


def locate(location: str) -> Place:
    """What a run file's ``store`` means.

    Args:
        location: a folder; ``sqlite:///path/to.db`` with run folders beside it; or
            ``postgresql+psycopg://user@host/name?folder=/path``, where ``folder`` (default
            ``runs``) is that of checkpoints and run files.
    Raises:
        InputError: another kind of database.
    """
    if "://" not in location:
        return _in_file(Path(location), Path(location) / "umbel.db", location)
    file = location.removeprefix("sqlite:///")
    if file and file != location:
        return _in_file(Path(file).parent, Path(file), location)
    kind = location.partition(":")[0].partition("+")[0]
    shown = f"{location.partition('://')[0]}://{location.rpartition('@')[2]}"
    if kind in ("postgresql", "postgres"):
        try:
            url = sa.make_url(location).set(drivername="postgresql+psycopg")
        except (sa.exc.ArgumentError, ValueError):
            fix = "write postgresql+psycopg://user@host/name?folder=/path"
            raise InputError("not a database URL", where=f"store = {shown!r}", fix=fix) from None
        folder = url.query.get("folder", "runs")
        shown = url.render_as_string(hide_password=True)
        return Place(Path(str(folder)), url.difference_update_query(["folder"]), shown)
    raise InputError(
        f"a store at '{kind}://' is not supported by this version",
        where=f"store = {location.rpartition('@')[2]!r}",  # what precedes @ is a password
        fix="use a folder, sqlite:///path/to.db or postgresql+psycopg://user@host/name",
    )


def _in_file(folder: Path, file: Path, shown: str) -> Place:
    return Place(folder, sa.URL.create("sqlite", database=str(file)), shown)


def _engine(place: Place) -> sa.Engine:
    if place.file is None:
        try:
            return sa.create_engine(
                place.url,
                pool_pre_ping=True,
                connect_args={"connect_timeout": BUSY_SECONDS, "application_name": "umbel"},
            )
        except ImportError:
            raise InputError(
                "PostgreSQL needs the package psycopg, which is not installed",
                where=place.shown,
                fix="pip install 'umbel[postgresql]'",
            ) from None
    engine = sa.create_engine(
        place.url, connect_args={"timeout": BUSY_SECONDS, "isolation_level": None}
    )

    def prepare(raw: sa.engine.interfaces.DBAPIConnection, _: object) -> None:
        sqlite.prepare(raw, "FULL", write_ahead=True, wait=BUSY_SECONDS, foreign_keys=True)

    sa.event.listen(engine, "connect", prepare)
    return engine


def _begin(connection: sa.Connection) -> None:
    if connection.dialect.name == "sqlite":
        # At once, not at the first change: a reader that turns writer is refused unheard.
        connection.exec_driver_sql("BEGIN IMMEDIATE")


def _version(connection: sa.Connection) -> str | None:
    """The migration that the database is at; ``None``: it has no tables of ours."""
    tables = sa.inspect(connection)
    if tables.has_table("alembic_version"):
        query = sa.text("SELECT version_num FROM alembic_version")
        return str(connection.execute(query).scalar_one())
    return FIRST if tables.has_table("round") and tables.has_table("run") else None


def _bring_up(connection: sa.Connection, place: Place) -> None:
    """Makes the tables, or migrates them; alone in the database, and asks again whether to."""
    lite = connection.dialect.name == "sqlite"
    if not lite:
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(MIGRATING)))
    found = _version(connection)
    if found == VERSION:
        return
    if found is not None and found > VERSION:
        raise InputError(
            f"the store has schema {found}, this Umbel reads {VERSION}",
            where=place.shown,
            fix="use the version of Umbel that wrote it, or another --store",
        )
    if found is None:
        metadata.create_all(connection)
        _stamp(connection, VERSION)
    else:
        if not sa.inspect(connection).has_table("alembic_version"):
            _stamp(connection, found)
        _migrate(connection)
    if lite:
        connection.exec_driver_sql(f"PRAGMA user_version = {SCHEMA}")


def _stamp(connection: sa.Connection, version: str) -> None:
    connection.exec_driver_sql(
        "CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL PRIMARY KEY)"
    )
    connection.exec_driver_sql(f"INSERT INTO alembic_version VALUES ('{version}')")


def _migrate(connection: sa.Connection) -> None:
    from alembic import command  # half a second, which only an old store costs
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", "umbel.server:migrations")
    config.attributes["connection"] = connection
    command.upgrade(config, VERSION)


@contextmanager
def translated(place: Path | str, what: str = "run store") -> Iterator[None]:
    """Turns the errors of the disk and of the database into one that a user can act on.

    Raises:
        InputError: ``place`` cannot be written, or is something else than a store.
        RunError: the disk is full or broken, or the store is locked.
    """
    try:
        yield
    except UmbelError:
        raise
    except OSError as error:
        where = str(error.filename or place)
        raise _error(error.strerror or str(error), where, what) from error
    except sa.exc.DatabaseError as error:
        raise _error(str(error.orig).strip(), str(place), what) from error


def _error(reason: str, where: str, what: str) -> UmbelError:
    text = reason.lower()
    if "full" in text or "no space" in text or "quota" in text or "file too large" in text:
        return RunError(f"the disk is full: {reason}", where=where, fix="free space, then resume")
    if "locked" in text:
        fix = "end the process that holds it, then resume"
        return RunError(f"the store is locked: {reason}", where=where, fix=fix)
    if "not a database" in text or "malformed" in text:
        fix = "restore it from a backup, or use another --store"
        return InputError(f"the store is damaged or not a store: {reason}", where=where, fix=fix)
    refused = ("permission", "read-only", "readonly", "unable to open", "directory", "exists")
    if any(word in text for word in refused):
        fix = "use a folder that is there and that you may write"
        if what == "run store":
            fix = "use a folder that you may write: [run] store or --store"
        return InputError(f"cannot write the {what}: {reason}", where=where, fix=fix)
    if "connect" in text or "://" in where:
        fix = "check that the database is up, its address, and who may connect"
        return RunError(f"the {what} failed: {reason}", where=where, fix=fix)
    return RunError(f"the {what} failed: {reason}", where=where, fix="check the disk")
