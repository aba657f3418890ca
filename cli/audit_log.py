"""What ``umbel site audit-log`` and ``umbel server audit-log`` share."""

from __future__ import annotations

from collections import deque
from pathlib import Path

from umbel.cli import output
from umbel.cli.output import Format
from umbel.core.audit_log import START, read
from umbel.core.errors import RunError


def verify(path: Path, noted: str | None, format: Format) -> None:
    """Checks the chain.

    Raises:
        RunError: an entry was changed or removed, or the noted hash is gone.
    """
    last, count, found = START, 0, noted in (None, START)
    for entry in read(path):
        last, count = entry["hash"], count + 1
        found = found or last == noted
    if not found:
        raise RunError(
            f"no entry has the hash {noted}: entries at the end were removed",
            where=str(path),
            fix="keep the file as evidence, and ask who could write it",
        )
    if format is Format.json:
        output.emit({"ok": True, "entries": count, "last": last})
    else:
        print(f"{count} entries, none changed; last hash {last}")


def show(path: Path, count: int, format: Format) -> None:
    """Shows the last entries."""
    entries = list(deque(read(path), maxlen=count))
    if format is Format.json:
        output.emit({"entries": entries})
        return
    hidden = {"number", "time", "event", "before", "hash", "nonce", "digest", "expires"}
    rows = [
        (
            entry["number"],
            entry["time"],
            entry["event"],
            " ".join(f"{k}={v}" for k, v in entry.items() if k not in hidden),
        )
        for entry in entries
    ]
    output.table(["entry", "time", "event", ""], rows, left=4)
