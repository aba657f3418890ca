"""A run as the store knows it, and how a user names one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from umbel.core.errors import InputError, suggest

if TYPE_CHECKING:  # pydantic is loaded only where a run file is asked for
    from umbel.core.run_file import RunFile

Ordered: TypeAlias = Literal["queued", "paused", "stopped"]
Status: TypeAlias = (
    Literal["running", "finished", "interrupted", "failed", "budget_exhausted"] | Ordered
)
Ended: TypeAlias = Literal["finished", "interrupted", "failed", "budget_exhausted"]


@dataclass(frozen=True)
class RunEntry:
    """A run as the store knows it.

    Args:
        run_id: of the run, unique in the store.
        name: ``[run] name``.
        status: ``running`` only while a live process runs it; why another was interrupted, a
            server's queue knows, and the store does not.
        engine: where its clients lived.
        started: when, ISO 8601, UTC.
        finished: when it last ended, or ``None``.
        seconds: wall time of the committed rounds.
        rounds_planned: ``[run] rounds``.
        rounds_done: committed rounds.
        configuration: the resolved run file, as plain values.
        versions: what it was made with.
        engine_plan: how its engine computed, and why so; empty where nothing was chosen.
        error: why it failed, or empty.
        pid: of the process that last ran it.
        host: of that process.
        metrics: those of the last committed round; empty where it was not evaluated.
    """

    run_id: str
    name: str
    status: Status
    engine: str
    started: str
    finished: str | None
    seconds: float
    rounds_planned: int
    rounds_done: int
    configuration: Mapping[str, Any]
    versions: Mapping[str, Any]
    engine_plan: Mapping[str, Any]
    error: str
    pid: int
    host: str
    metrics: Mapping[str, float]

    @property
    def run(self) -> RunFile:
        """The resolved run file."""
        from umbel.core import run_file

        return run_file.resolve(self.configuration, f"run {self.run_id}")

    def as_json(self) -> dict[str, Any]:
        """The run as plain values, without its configuration and versions."""
        return {
            "run_id": self.run_id,
            "name": self.name,
            "status": self.status,
            "rounds": self.rounds_done,
            "rounds_planned": self.rounds_planned,
            "engine": self.engine,
            "started": self.started,
            "finished": self.finished,
            "seconds": round(self.seconds, 6),
            "metrics": dict(self.metrics),
            "error": self.error,
        }

    @classmethod
    def of_row(cls, row: Mapping[str, Any], alive: bool) -> RunEntry:
        """From a row of the run table with the last ``record``.

        Args:
            row: the columns, and ``record``: the last committed round as JSON text, or ``None``.
            alive: whether a live process runs it. A killed one could not write that it ended.
        """
        table = {
            name: value for name, value in row.items() if name not in ("id", "record", "indexed")
        }
        if table["status"] == "running" and not alive:
            table["status"] = "interrupted"
        table["configuration"] = json.loads(table["configuration"])
        table["versions"] = json.loads(table["versions"])
        table["engine_plan"] = json.loads(table["engine_plan"])
        last = json.loads(row["record"]) if row["record"] else {}
        return cls(run_id=row["id"], metrics=last.get("metrics", {}), **table)


def select(runs: Sequence[RunEntry], wanted: str, location: str) -> RunEntry:
    """The run whose id is ``wanted``, or alone begins with it; ``latest`` is the newest.

    Args:
        runs: the newest first.
        wanted: what the user wrote.
        location: of the store, for the error.

    Raises:
        InputError: none does, or several do; they are listed.
    """
    if wanted == "latest" and runs:
        return runs[0]
    begin = [r for r in runs if wanted and r.run_id.startswith(wanted)]
    exact = [r for r in begin if r.run_id == wanted]
    if len(exact or begin) == 1:
        return (exact or begin)[0]
    where = f"run store {location}"
    if begin:
        ids = ", ".join(r.run_id for r in begin[:5]) + (", …" if len(begin) > 5 else "")
        raise InputError(
            f"{len(begin)} runs begin with '{wanted}'", where=where, fix=f"give more of it: {ids}"
        )
    named = [r.run_id for r in runs if wanted and wanted in r.run_id]
    known = named or [r.run_id for r in runs][:5]
    fix = f"did you mean '{named[0]}'?" if len(named) == 1 else suggest(wanted, known)
    if not runs:
        fix = "the store is empty; --store names another"
    raise InputError(f"no run '{wanted}'", where=where, fix=fix)
