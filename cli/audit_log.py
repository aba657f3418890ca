"""``audit-log verify`` and ``show``, of a site and of a server."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from umbel.cli import output
from umbel.cli.output import Format, FormatOption
from umbel.core.audit_log import START, read
from umbel.core.errors import InputError, RunError

FolderOption: TypeAlias = Annotated[
    Path, typer.Option("--folder", metavar="DIR", help="The folder whose log it is.")
]
HashOption: TypeAlias = Annotated[
    str | None, typer.Option(metavar="HEX", help="A hash noted elsewhere; it must still be there.")
]
LastOption: TypeAlias = Annotated[int, typer.Option(metavar="N", help="How many entries.")]

HIDDEN = {"number", "time", "event", "before", "hash", "nonce", "digest", "expires"}


def verbs(help: str, here: Path, log: Callable[[Path], Path]) -> typer.Typer:
    """The two verbs.

    Args:
        help: what is in the log.
        here: the folder where none is named.
        log: folder -> its log.
    """
    app = typer.Typer(help=help)

    @app.command()
    def verify(
        hash: HashOption = None, folder: FolderOption = here, format: FormatOption = Format.text
    ) -> None:
        """Check that no entry was changed or removed; shows the last hash, to be noted."""
        last, count = _checked(_there(log(folder)), hash)
        if format is Format.json:
            output.emit({"ok": True, "entries": count, "last": last})
        else:
            print(f"{count} entries, none changed; last hash {last}")

    @app.command()
    def show(
        last: LastOption = 20, folder: FolderOption = here, format: FormatOption = Format.text
    ) -> None:
        """Show the last entries."""
        entries = list(deque(read(_there(log(folder))), maxlen=last))
        if format is Format.json:
            output.emit({"entries": entries})
            return
        rows = [
            (
                entry["number"],
                entry["time"],
                entry["event"],
                " ".join(f"{k}={v}" for k, v in entry.items() if k not in HIDDEN),
            )
            for entry in entries
        ]
        output.table(["entry", "time", "event", ""], rows, left=4)

    return app


def _there(path: Path) -> Path:
    """The log's path.

    Raises:
        InputError: there is no log.
    """
    if not path.is_file():
        fix = "nothing was done there yet, or somebody removed it, or --folder names another"
        raise InputError("no audit log", where=str(path), fix=fix)
    return path


def _checked(path: Path, noted: str | None) -> tuple[str, int]:
    """The last hash and how many entries, after the chain was checked.

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
    return last, count
