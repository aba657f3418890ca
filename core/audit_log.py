"""An audit log that cannot be changed unseen: each entry holds the hash of the one before.

One JSON object a line. Whoever keeps the last hash elsewhere (on paper, at the other side) can tell
that lines at the end were removed, too; without it, everything but a cut at the end is seen.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from umbel.core.canonical import canonical_json
from umbel.core.errors import RunError

if sys.platform != "win32":
    import fcntl

START = "0" * 64


class AuditLog:
    """The log at ``path``, made by the first entry. Several processes may write it.

    A line that a power cut left unfinished is moved to ``path``.torn: nothing followed from it.

    Raises:
        RunError: the log was changed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.last = START
        self.entries = 0
        self._size = 0
        if path.exists():
            with self._held() as file:
                self._catch_up(file)

    def add(self, event: str, **facts: Any) -> str:
        """Appends an entry, durable when this returns; its hash.

        Raises:
            RunError: somebody changed the log.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._held() as file:
            self._catch_up(file)
            entry = {
                "number": self.entries + 1,
                "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "event": event,
                **facts,
                "before": self.last,
            }
            entry["hash"] = _hash(entry)
            line = canonical_json(entry).encode() + b"\n"
            file.seek(0, os.SEEK_END)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
            self.last, self.entries = str(entry["hash"]), self.entries + 1
            self._size += len(line)
        return self.last

    @contextmanager
    def _held(self) -> Iterator[IO[bytes]]:
        """The file, this process's alone until the end of the block."""
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        with os.fdopen(descriptor, "rb+") as file:
            if sys.platform != "win32":
                fcntl.flock(file, fcntl.LOCK_EX)
            yield file

    def _catch_up(self, file: IO[bytes]) -> None:
        """Reads what was added since this object last looked."""
        size = os.fstat(file.fileno()).st_size
        if size == self._size:
            return
        if size < self._size:
            raise _changed(self.path, self.entries)
        file.seek(self._size)
        added = file.read()
        whole = added.rfind(b"\n") + 1
        if whole < len(added):
            self.path.with_name(f"{self.path.name}.torn").write_bytes(added[whole:])
            file.truncate(self._size + whole)
        for line in added[:whole].splitlines():
            self.last = _checked(line, self.last, self.entries + 1, self.path)["hash"]
            self.entries += 1
        self._size += whole


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The entries, each checked against the one before; an unfinished last line is left out.

    Raises:
        RunError: a line was changed, removed or added, by its number.
    """
    if not path.exists():
        return
    last = START
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            entry = _checked(line, last, number, path)
            last = entry["hash"]
            yield entry


def _checked(line: bytes, before: str, number: int, path: Path) -> dict[str, Any]:
    try:
        entry: dict[str, Any] = json.loads(line)
        kept = {key: value for key, value in entry.items() if key != "hash"}
        good = (entry["before"], entry["number"]) == (before, number)
        if good and entry["hash"] == _hash(kept):
            return entry
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise _changed(path, number)


def _changed(path: Path, number: int) -> RunError:
    return RunError(
        f"line {number} is not what was written",
        where=str(path),
        fix="keep the file as evidence, and ask who could write it",
    )


def _hash(entry: dict[str, Any]) -> str:
    return hashlib.sha256(canonical_json(entry).encode()).hexdigest()
