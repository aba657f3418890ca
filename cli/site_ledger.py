"""``umbel site ledger``: what this site's data have spent of their privacy, by its own account."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from umbel.cli import output
from umbel.cli.output import Format, FormatOption

LINES_SHOWN = 20


def ledger(
    folder: Annotated[
        Path, typer.Option("--folder", metavar="DIR", help="The site's folder, or its ledger's.")
    ] = Path("umbel-site"),
    format: FormatOption = Format.text,
) -> None:
    """Show what this site's data have spent of their privacy."""
    from umbel.client.site_ledger import read

    inner = folder / "ledger"
    found = read(inner if inner.is_dir() else folder)
    if format is Format.json:
        output.emit({"ledgers": found})
        return
    for table in found:
        lines = table.pop("lines")
        rows = [(k.replace("_", " "), v) for k, v in table.items() if v not in (None, [], {})]
        output.table([str(table["owner"]), ""], rows, left=2)
        shown = [
            (line["run"], line["round"], line["purpose"], line["steps"])
            for line in lines[-LINES_SHOWN:]
        ]
        output.table(["run", "round", "purpose", "steps"], shown, left=1)
