"""``umbel list`` and ``umbel version``."""

from __future__ import annotations

from typing import Annotated

import typer

from umbel.cli import output, soundness
from umbel.cli.output import Format, FormatOption
from umbel.core.errors import InputError, suggest

KINDS = (
    "strategies",
    "tasks",
    "models",
    "adapters",
    "methods",
    "datasets",
    "splits",
    "engines",
    "attacks",
    "defences",
)


def list_parts(
    kind: Annotated[str, typer.Argument(metavar="KIND", help=" | ".join(KINDS))],
    format: FormatOption = Format.text,
) -> None:
    """List the parts that a run file can name."""
    from umbel.core import registry

    if kind not in KINDS:
        raise InputError(f"unknown kind '{kind}'", where="umbel list", fix=suggest(kind, KINDS))
    parts = registry.known(kind) if kind in registry.KINDS else {}
    sound = soundness.read() if kind == "tasks" else None
    if format is Format.json:
        listed = [{"name": n, "summary": text} for n, text in parts.items()]
        output.emit({kind: listed} | ({} if sound is None else {"soundness": sound}))
    elif parts:
        output.table([kind, ""], list(parts.items()), left=2)
    else:
        print(f"this version has no {kind}")
    if sound is not None and format is Format.text:
        found = soundness.shown(sound)
        units = ["task", "an example is", "example-level privacy", "client-level privacy"]
        output.table(units, found.tasks, left=4)
        family = ["strategies", "privacy", "updates in clear", "secure aggregation"]
        output.table(family, found.families, left=4)
        for number, reason in enumerate(found.reasons, 1):
            print(f"({number}) {reason}")


def version(format: FormatOption = Format.text) -> None:
    """Show the versions that a result depends on."""
    from umbel.core.versions import versions

    found = versions()
    if format is Format.json:
        output.emit(found)
    else:
        output.table(["version", ""], list(found.items()), left=2)
