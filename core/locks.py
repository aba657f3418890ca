"""Who is running a run: a lock that the operating system lets go of when its process dies.

A process id alone cannot tell: ids are used again, and every container's first process is 1.
"""

from __future__ import annotations

import os
import sys
import weakref
from pathlib import Path
from typing import IO

if sys.platform != "win32":
    import fcntl

_held: weakref.WeakSet[IO[bytes]] = weakref.WeakSet()


def _let_go() -> None:
    # A forked child shares the lock and would keep it after its parent was killed.
    for file in list(_held):
        file.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


def acquire(path: Path) -> IO[bytes] | None:
    """Locks ``path`` until the returned file is closed or its process ends; ``None``: taken.

    Raises:
        OSError: the file cannot be written, or its file system has no locks.
    """
    file = open(path, "ab")  # noqa: SIM115 - it is the lock, and outlives this function
    try:
        if sys.platform != "win32":
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    _held.add(file)
    return file


def is_held(path: Path) -> bool:
    """Whether a live process, this one included, holds the lock ``path``.

    Asks with a shared lock, so that two who ask at once do not take each other for the holder.
    """
    try:
        with open(path, "rb") as file:
            if sys.platform != "win32":
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
