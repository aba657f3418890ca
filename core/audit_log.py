"""An audit log that cannot be changed unseen: each entry holds the hash of the one before.

One JSON object a line. Whoever keeps the last hash elsewhere (on paper, at the other side) can tell
that lines at the end were removed, too; without it, everything but a cut at the end is seen.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from umbel.core.errors import RunError

START = "0" * 64


class AuditLog:
    """The log at ``path``, made by the first entry; one process writes it.

    A line that a power cut left unfinished is moved to ``path``.torn: nothing followed from it.

    Raises:
        RunError: the log was changed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.last = START
        self.entries = 0
        _mend(path)
        for entry in read(path):
            self.last = entry["hash"]
            self.entries += 1
        self._file: IO[bytes] | None = None

    def add(self, event: str, **facts: Any) -> str:
        """Appends an entry, durable when this returns; its hash."""
        entry = {
            "number": self.entries + 1,
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "event": event,
            **facts,
            "before": self.last,
        }
        entry["hash"] = _hash(entry)
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            self._file = os.fdopen(descriptor, "ab")
        self._file.write(_json(entry).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.last, self.entries = entry["hash"], self.entries + 1
        return self.last

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The entries, each checked against the one before.

    Raises:
        RunError: a line was changed, removed or added, by its number.
    """
    if not path.exists():
        return
    last = START
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                entry = json.loads(line)
                found = entry["hash"]
                good = (
                    entry["before"] == last
                    and entry["number"] == number
                    and found == _hash({k: v for k, v in entry.items() if k != "hash"})
                )
            except (ValueError, KeyError, TypeError):
                good = False
            if not good:
                raise RunError(
                    f"line {number} is not what was written",
                    where=str(path),
                    fix="keep the file as evidence, and ask who could write it",
                )
            last = found
            yield entry


def _mend(path: Path) -> None:
    if not path.exists():
        return
    with path.open("rb+") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            path.with_name(f"{path.name}.torn").write_bytes(content[whole:])
            file.truncate(whole)


def _hash(entry: dict[str, Any]) -> str:
    return hashlib.sha256(_json(entry).encode()).hexdigest()


def _json(entry: dict[str, Any]) -> str:
    return json.dumps(entry, sort_keys=True, separators=(",", ":"), allow_nan=False)
