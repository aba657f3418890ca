"""The queue of a server: runs that were submitted, in their order, and what became of them.

A file that whoever administers the server may write; submitting a run is an entry in it. So orders
can be given while the server is down, and there is no port by which others could give them.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from umbel.core.errors import InputError, suggest
from umbel.core.run_file import RunFile

State: TypeAlias = Literal[
    "queued", "running", "paused", "stopped", "finished", "failed", "budget_exhausted"
]
OVER = ("stopped", "finished", "failed", "budget_exhausted")

BUSY_SECONDS = 30.0

TABLE = """
CREATE TABLE IF NOT EXISTS job (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    name TEXT NOT NULL,
    state TEXT NOT NULL,
    wanted TEXT NOT NULL DEFAULT '',
    run TEXT NOT NULL,
    text TEXT NOT NULL,
    sites INTEGER NOT NULL,
    run_id TEXT NOT NULL DEFAULT '',
    round INTEGER NOT NULL DEFAULT 0,
    rounds INTEGER NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0,
    submitted TEXT NOT NULL,
    changed TEXT NOT NULL,
    error TEXT NOT NULL DEFAULT ''
)
"""


class Job(NamedTuple):
    """A run in the queue.

    Args:
        id: what it is called, also towards the sites.
        name: of the run.
        state: where it is.
        wanted: an order that was not carried out yet: ``pause``, ``stop`` or nothing.
        run: the run file's tables.
        text: the run file as the user wrote it.
        sites: how many sites it waits for; 0: all members.
        run_id: in the store; empty before its first start.
        round: the last committed round.
        rounds: planned.
        attempts: starts in a row that ended without a new round.
        submitted: when, ISO 8601.
        changed: when its state last changed.
        error: why it failed, or waits.
    """

    id: str
    name: str
    state: State
    wanted: str
    run: dict[str, Any]
    text: str
    sites: int
    run_id: str
    round: int
    rounds: int
    attempts: int
    submitted: str
    changed: str
    error: str

    def as_json(self) -> dict[str, Any]:
        """For lists: without the run file."""
        return {k: v for k, v in self._asdict().items() if k not in ("run", "text")}


class Jobs:
    """The queue in the file at ``path``, made by the first entry. Several processes may use it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def submit(self, run: RunFile, text: str, sites: int) -> Job:
        """Puts a run at the end of the queue.

        Args:
            run: the run file; where the server keeps its records is the server's own affair.
            text: as the user wrote it.
            sites: how many to wait for; 0: all members.
        """
        now = _now()
        job_id = f"{run.run.name}-{secrets.token_hex(4)}"
        tables = json.dumps(run.model_dump(mode="json", exclude={"run": {"store"}}))
        with self._write() as connection:
            connection.execute(
                "INSERT INTO job (id, name, state, run, text, sites, rounds, submitted, changed) "
                "VALUES (?, ?, 'queued', ?, ?, ?, ?, ?, ?)",
                (job_id, run.run.name, tables, text, sites, run.run.rounds, now, now),
            )
        return self.get(job_id)

    def list(self) -> list[Job]:
        """All jobs, in the order they were submitted."""
        if not self._path.exists():
            return []
        with closing(self._connect()) as connection:
            rows = connection.execute("SELECT * FROM job ORDER BY number").fetchall()
        return [_job(row) for row in rows]

    def get(self, name: str) -> Job:
        """The job with this id or run id, or the only one whose id or run id begins so.

        Raises:
            InputError: none, or several.
        """
        jobs = self.list()
        whole = [job for job in jobs if name in (job.id, job.run_id)]
        found = whole or [
            job
            for job in jobs
            if job.id.startswith(name) or (job.run_id and job.run_id.startswith(name))
        ]
        if len(found) == 1 and name:
            return found[0]
        raise InputError(
            f"{'several runs begin' if found else 'no run begins'} with '{name}'",
            where=str(self._path),
            fix=suggest(name, [job.id for job in found or jobs]),
        )

    def want(self, job: Job, order: Literal["pause", "resume", "stop"]) -> Job:
        """Enters an order; a run that does not run now obeys at once.

        Raises:
            InputError: the run is over, or is not in a state for that.
        """
        if job.state in OVER and not (order == "resume" and job.state in ("stopped", "failed")):
            raise InputError(
                f"'{job.id}' is {job.state}", where="queue", fix="submit it again for a new run"
            )
        if order == "resume":
            if job.state not in ("paused", "stopped", "failed"):
                raise InputError(f"'{job.id}' is {job.state}", where="queue", fix="nothing to do")
            return self.change(job.id, state="queued", wanted="", error="", attempts=0)
        if job.state == "running":
            return self.change(job.id, wanted=order)
        return self.change(job.id, state="paused" if order == "pause" else "stopped", wanted="")

    def change(self, job_id: str, **values: Any) -> Job:
        """Enters new values of some fields."""
        values["changed"] = _now()
        names = ", ".join(f"{name} = ?" for name in values)
        with self._write() as connection:
            connection.execute(f"UPDATE job SET {names} WHERE id = ?", (*values.values(), job_id))
        return self.get(job_id)

    @contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        with closing(self._connect()) as connection, connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute(TABLE)
            yield connection

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._path, timeout=BUSY_SECONDS, isolation_level=None)
        connection.row_factory = sqlite3.Row
        connection.execute("PRAGMA synchronous = FULL")
        return connection


def _job(row: sqlite3.Row) -> Job:
    table = {name: row[name] for name in Job._fields}
    table["run"] = json.loads(table["run"])
    return Job(**table)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
