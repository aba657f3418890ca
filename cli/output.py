"""How every verb answers: one JSON object or text on stdout, errors the same way everywhere."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

if TYPE_CHECKING:
    from rich.console import Console


class Format(StrEnum):
    """What stdout holds."""

    text = "text"
    json = "json"


FormatOption: TypeAlias = Annotated[
    Format,
    typer.Option("--format", help="json: one JSON object on stdout, progress on stderr."),
]
StoreOption: TypeAlias = Annotated[
    str, typer.Option("--store", metavar="S", help="The run store: a folder or a database URL.")
]


def emit(payload: Mapping[str, Any]) -> None:
    """Writes the one JSON object; NaN and infinities, which JSON has not, are null."""
    sys.stdout.write(json.dumps(finite(payload), indent=2, allow_nan=False, default=str) + "\n")
    sys.stdout.flush()


def finite(value: Any) -> Any:
    """``value`` with null for every number that is not finite, at any depth."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return value


def fail(as_json: bool, message: str, where: str, fix: str, code: int) -> int:
    """Reports an error: as JSON on stdout, else as one line on stderr; returns ``code``."""
    from umbel.core.errors import UmbelError

    if as_json:
        emit({"error": {"message": message, "where": where, "fix": fix}})
    else:
        note(f"error: {UmbelError(message, where=where, fix=fix)}")
    return code


def note(text: str) -> None:
    """One line on stderr."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def console() -> Console:
    """Where tables go: stdout, as wide as the terminal; 120 columns where it is none."""
    from rich.console import Console

    return Console(
        file=sys.stdout,
        width=None if sys.stdout.isatty() else 120,
        highlight=False,
        soft_wrap=not sys.stdout.isatty(),
    )


def table(
    columns: Sequence[str], rows: Iterable[Sequence[Any]], *, title: str = "", left: int = 1
) -> None:
    """Prints a table; the first ``left`` columns are text, the others are set right as numbers."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    drawn = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for place, column in enumerate(columns):
        side = "left" if place < left else "right"
        drawn.add_column(column, justify=side, overflow="fold")  # type: ignore[arg-type]
    for row in rows:
        drawn.add_row(*(Text(number(cell)) for cell in row))
    console().print(drawn)


def number(value: Any) -> str:
    """A cell's text: four significant digits for a float, a dash for nothing."""
    if value is None or value == "":
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def size(count: float) -> str:
    """Bytes in a readable unit (decimal)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def duration(seconds: float) -> str:
    """Seconds as ``3.2 s``, ``4 min 05 s`` or ``2 h 10 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
