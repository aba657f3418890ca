"""The store's two tables, in one SQLite file that survives power cuts and takes several writers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy as sa

from umbel.core.errors import InputError, RunError, UmbelError

SCHEMA = 1
BUSY_SECONDS = 30

_metadata = sa.MetaData()

run_table = sa.Table(
    "run",
    _metadata,
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
)

round_table = sa.Table(
    "round",
    _metadata,
    sa.Column("run_id", sa.Text, sa.ForeignKey("run.id"), primary_key=True),
    sa.Column("round", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("record", sa.Text, nullable=False),
    sa.Column("checkpoint", sa.Text),
    sa.Column("sha256", sa.Text),
)


class Database:
    """The file at ``path``: made by the first :meth:`write`, opened when first asked.

    WAL lets readers look while a run writes; ``synchronous=FULL`` makes a committed round durable.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._engine: sa.Engine | None = None

    def exists(self) -> bool:
        """Whether anything was ever written."""
        return self.path.is_file()

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """A connection that sees what is committed.

        Raises:
            UmbelError: the file is damaged, not a database, or of a newer Umbel.
        """
        with translated(self.path), self._connected().connect() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """One transaction: committed at the end of the block, undone by an exception.

        Raises:
            UmbelError: as :meth:`read`; or the disk is full, the file cannot be written, or another
                process kept it locked for half a minute.
        """
        with translated(self.path), self._connected().begin() as connection:
            # At once, not at the first change: a reader that turns writer is refused unheard.
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            yield connection

    def close(self) -> None:
        """Closes the file."""
        if self._engine is not None:
            self._engine.dispose()
            self._engine = None

    def _connected(self) -> sa.Engine:
        if self._engine is None:
            engine = sa.create_engine(
                f"sqlite:///{self.path}",
                connect_args={"timeout": BUSY_SECONDS, "isolation_level": None},
            )
            sa.event.listen(engine, "connect", lambda raw, _: _prepare(raw))
            with engine.begin() as connection:
                connection.exec_driver_sql("BEGIN IMMEDIATE")
                found = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
                if found == 0:
                    _metadata.create_all(connection)
                    connection.exec_driver_sql(f"PRAGMA user_version = {SCHEMA}")
                elif found != SCHEMA:
                    raise InputError(
                        f"the store has schema {found}, this Umbel reads {SCHEMA}",
                        where=str(self.path),
                        fix="use the version of Umbel that wrote it, or another --store",
                    )
            self._engine = engine
        return self._engine


def locate(location: str) -> tuple[Path, Path]:
    """The folder and the database file of a store: a folder, or ``sqlite:///path/to.db``.

    Raises:
        InputError: another kind of database.
    """
    file = location.removeprefix("sqlite:///")
    if file and file != location:
        return Path(file).parent, Path(file)
    if "://" not in location:
        return Path(location), Path(location) / "umbel.db"
    kind = location.partition(":")[0].partition("+")[0]
    name = "PostgreSQL" if kind.startswith("postgres") else f"a store at '{kind}://'"
    raise InputError(
        f"{name} is not supported by this version",
        where=f"store = {location.rpartition('@')[2]!r}",  # what precedes @ is a password
        fix="use a folder, or sqlite:///path/to.db",
    )


def _prepare(raw: sa.engine.interfaces.DBAPIConnection) -> None:
    cursor = raw.cursor()
    try:
        deadline = time.monotonic() + BUSY_SECONDS
        while True:  # SQLite does not wait by itself when two connections switch to WAL at once
            try:
                cursor.execute("PRAGMA journal_mode = WAL")
                break
            except Exception as error:
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
        cursor.execute("PRAGMA synchronous = FULL")
        cursor.execute("PRAGMA foreign_keys = ON")
    finally:
        cursor.close()


@contextmanager
def translated(place: Path, what: str = "run store") -> Iterator[None]:
    """Turns the errors of the disk and of SQLite into one that a user can act on.

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
        raise _error(str(error.orig), str(place), what) from error


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
    return RunError(f"the {what} failed: {reason}", where=where, fix="check the disk")
