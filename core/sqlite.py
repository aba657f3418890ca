"""How a connection to an SQLite file is set up, the same for every file that Umbel keeps."""

from __future__ import annotations

import time
from typing import Any, Literal

PAUSE = 0.01


def prepare(
    connection: Any,
    synchronous: Literal["NORMAL", "FULL", "EXTRA"],
    *,
    write_ahead: bool,
    wait: float,
    foreign_keys: bool = False,
) -> None:
    """Sets a new connection up.

    Args:
        connection: of :mod:`sqlite3`, outside a transaction.
        synchronous: what outlasts a power cut; with a write-ahead log, all that is committed from
            ``FULL`` on.
        write_ahead: whether readers look while another writes; not for network disks.
        wait: seconds to wait for another who switches the log on at the same time.
        foreign_keys: whether they are checked.
    Raises:
        sqlite3.Error: the file is no database, or another kept it locked.
    """
    if write_ahead:
        _write_ahead(connection, time.monotonic() + wait)
    connection.execute(f"PRAGMA synchronous = {synchronous}")
    if foreign_keys:
        connection.execute("PRAGMA foreign_keys = ON")


def _write_ahead(connection: Any, until: float) -> None:
    # SQLite does not wait by itself where two connections turn the log of a new file on at once.
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except Exception as error:
            if "locked" not in str(error) or time.monotonic() > until:
                raise
            time.sleep(PAUSE)
