"""The table of what may be combined, as ``umbel list tasks`` and the documentation show it."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any, NamedTuple

PREFIX = "cannot be trained privately: "


class Shown(NamedTuple):
    """The table with each reason once.

    Args:
        tasks: task, what one example of it is, and by unit of privacy ``yes`` or ``no (K)``.
        families: of strategies, unit, and the same without and with secure aggregation.
        reasons: the first is 1.
    """

    tasks: list[tuple[str, str, str, str]]
    families: list[tuple[str, str, str, str]]
    reasons: list[str]


def read() -> dict[str, Any]:
    """What ``python -m umbel.simulations.soundness`` wrote."""
    text = files("umbel.tasks").joinpath("soundness.json").read_text(encoding="utf-8")
    table: dict[str, Any] = json.loads(text)
    return table


def shown(table: dict[str, Any]) -> Shown:
    """The table, to be read by people."""
    reasons: list[str] = []

    def cell(reason: str) -> str:
        reason = reason.removeprefix(PREFIX)
        if reason and reason not in reasons:
            reasons.append(reason)
        return f"no ({reasons.index(reason) + 1})" if reason else "yes"

    tasks = [
        (name, found["record"], cell(found["example"]), cell(found["client"]))
        for name, found in table["tasks"].items()
    ]
    families = [
        (family, unit, cell(plain), cell(secure))
        for family, units in table["families"].items()
        for unit, (plain, secure) in units.items()
    ]
    return Shown(tasks, families, reasons)
