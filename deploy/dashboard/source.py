"""What the dashboard shows, read from the store and the server's folder; nothing of a run waits."""

from __future__ import annotations

import hashlib
import math
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import sqlalchemy as sa

from umbel.core import audit_log
from umbel.core.errors import InputError, RunError, UmbelError
from umbel.deploy.jobs import Job, Jobs
from umbel.deploy.server_folder import ServerFolder, SiteRecord
from umbel.deploy.state import ServerState, server_state
from umbel.server import journal
from umbel.server.database import Database, locate
from umbel.server.entries import Ordered, RunEntry
from umbel.server.schema import dispatch_table
from umbel.server.store import RunStore

AUDIT_SHOWN = 300


class Dispatched(NamedTuple):
    """One client in one round, as the dispatch table has it; times in seconds since 1970."""

    round: int
    client: str
    sent: float | None
    done: float | None
    bytes_down: int | None
    bytes_up: int | None
    status: str
    reason: str


class Client(NamedTuple):
    """What is known of a client.

    Args:
        name: of the client.
        site: its record, where it is a member of the server.
        online: whether it is there now; ``None``: not known.
        rounds: in which it was asked.
        failed: of these.
        seconds: mean time from request to answer; ``None``: not known.
        received: bytes from it.
        last_run: the newest run that asked it.
        last_error: its last failure, with run and round; empty: none.
        versions: what it has installed.
        hardware: what its machine is, where it tells.
    """

    name: str
    site: SiteRecord | None
    online: bool | None
    rounds: int
    failed: int
    seconds: float | None
    received: int
    last_run: str
    last_error: str
    versions: Mapping[str, str]
    hardware: Mapping[str, str]


class Model(NamedTuple):
    """The model of an ended run: its file, bytes and hash."""

    entry: RunEntry
    path: Path
    size: int
    sha256: str


class AuditLine(NamedTuple):
    """An entry of the server's chained log or of the store's table."""

    time: str
    log: str
    actor: str
    event: str
    run_id: str
    facts: Mapping[str, Any]


class Source:
    """A store, and the server that it belongs to, where it does.

    Args:
        location: of the store.
        folder: of the server; ``None``: simulations alone.
    """

    def __init__(self, location: str, folder: ServerFolder | None = None) -> None:
        self.folder = folder
        self.location = location
        self.store = RunStore(location)
        self._database = Database(locate(location))
        self._hashes: dict[Path, tuple[tuple[int, int], str]] = {}
        self._lock = threading.Lock()

    @property
    def jobs(self) -> Jobs | None:
        """The queue of the server."""
        return None if self.folder is None else Jobs(self.folder.jobs_database)

    def queue(self) -> Sequence[Job]:
        """What stands in the queue, or did, the newest first."""
        return [] if self.jobs is None else self.jobs.list()[::-1]

    def job_of(self, run_id: str) -> Job | None:
        """The entry of the queue that a run is."""
        return next((job for job in self.queue() if job.run_id == run_id), None)

    def server(self) -> ServerState | None:
        """The server's state, where there is one."""
        return None if self.folder is None else server_state(self.folder)

    def runs(self) -> Sequence[RunEntry]:
        """The runs, the newest first; one that was interrupted is what the queue says of it."""
        ordered: dict[str, Ordered] = {}
        for job in self.queue():
            if job.state in ("queued", "paused", "stopped"):
                ordered.setdefault(job.run_id, job.state)
            elif job.state == "running" and job.error:  # it waits to be tried again
                ordered.setdefault(job.run_id, "queued")
        return [
            replace(entry, status=ordered[entry.run_id])
            if entry.status == "interrupted" and entry.run_id in ordered
            else entry
            for entry in self.store.list()
        ]

    def run(self, run_id: str) -> RunEntry:
        """The run with exactly this id.

        Raises:
            InputError: there is none.
        """
        for entry in self.runs():
            if entry.run_id == run_id:
                return entry
        raise InputError(f"no run '{run_id[:80]}'", where="run store", fix="see the list of runs")

    def dispatches(self, run_id: str, after: int = 0) -> Sequence[Dispatched]:
        """Who was asked in the rounds after ``after``, in order."""
        columns = [dispatch_table.c[name] for name in Dispatched._fields]
        mine = (dispatch_table.c.run_id == run_id, dispatch_table.c.round > after)
        query = sa.select(*columns).where(*mine)
        query = query.order_by(dispatch_table.c.round, dispatch_table.c.client)
        with self._database.read() as connection:
            return [Dispatched(*row) for row in connection.execute(query)]

    def clients(self, most: int = 500) -> Sequence[Client]:
        """Every site of the server, and the clients of the store's runs, those asked most first."""
        sites = {} if self.folder is None else self.folder.sites()
        told = {} if self.folder is None else self.folder.clients()
        state = self.server()
        table = dispatch_table
        failed = sa.func.sum(sa.case((table.c.status == "failed", 1), else_=0))
        query = sa.select(
            table.c.client,
            sa.func.count(),
            failed,
            sa.func.avg(table.c.done - table.c.sent),
            sa.func.sum(table.c.bytes_up),
            sa.func.max(table.c.run_id),  # ids begin with the time
        ).group_by(table.c.client)
        query = query.order_by(failed.desc(), sa.func.count().desc(), table.c.client).limit(most)
        rows, errors = {}, {}
        if self._database.exists():
            with self._database.read() as connection:
                rows = {row[0]: row for row in connection.execute(query)}
                for name in rows:
                    errors[name] = self._last_error(connection, name)
        names = [*sites, *(name for name in rows if name not in sites)]
        found = []
        for name in names:
            _, count, lost, mean, received, last = rows.get(name, ("", 0, 0, None, 0, ""))
            online = None
            if state is not None and name in sites:
                online = bool(state.sites.get(name, {}).get("online"))
            said = told.get(name, {})
            found.append(
                Client(
                    name,
                    sites.get(name),
                    online,
                    count,
                    int(lost or 0),
                    None if mean is None else float(mean),
                    int(received or 0),
                    last or "",
                    errors.get(name, ""),
                    said.get("versions", {}),
                    said.get("hardware", {}),
                )
            )
        return found

    def models(self) -> Sequence[Model]:
        """The models of ended runs, the newest first."""
        found = []
        for entry in self.runs():
            model = self.model(entry)
            if model is not None:
                found.append(model)
        return found

    def model(self, entry: RunEntry) -> Model | None:
        """The model of a run, where it has ended with one."""
        path = self.store.folder / entry.run_id / "model.safetensors"
        try:
            stat = path.stat()
            key = stat.st_mtime_ns, stat.st_size
            with self._lock:
                known = self._hashes.get(path)
            if known is None or known[0] != key:
                with path.open("rb") as file:
                    known = key, hashlib.file_digest(file, "sha256").hexdigest()
                with self._lock:
                    self._hashes[path] = known
        except OSError:
            return None
        return Model(entry, path, stat.st_size, known[1])

    def audit(self) -> tuple[Sequence[AuditLine], str]:
        """The last entries of both logs, the newest first; and what is wrong with the chain."""
        lines, wrong = [], ""
        if self._database.exists():
            with self._database.read() as connection:
                for row in journal.notes(connection, AUDIT_SHOWN):
                    lines.append(
                        AuditLine(
                            row["time"],
                            "store",
                            row["actor"],
                            row["event"],
                            row["run_id"],
                            row["facts"],
                        )
                    )
        if self.folder is not None:
            chained = []
            try:
                for entry in audit_log.read(self.folder.audit_file):
                    hidden = ("number", "time", "event", "before", "hash", "run_id", "actor")
                    facts = {k: v for k, v in entry.items() if k not in hidden}
                    actor = str(entry.get("actor", "umbel"))
                    run_id = str(entry.get("run_id", ""))
                    chained.append(
                        AuditLine(entry["time"], "server", actor, entry["event"], run_id, facts)
                    )
            except RunError as error:
                wrong = str(error)
            lines += chained[-AUDIT_SHOWN:]
        return sorted(lines, key=lambda line: line.time, reverse=True)[:AUDIT_SHOWN], wrong

    @staticmethod
    def _last_error(connection: sa.Connection, client: str) -> str:
        table = dispatch_table
        mine = (table.c.client == client, table.c.status == "failed")
        query = sa.select(table.c.run_id, table.c.round, table.c.reason).where(*mine)
        newest = query.order_by(table.c.run_id.desc(), table.c.round.desc()).limit(1)
        row = connection.execute(newest).first()
        return "" if row is None else f"{row.reason} (round {row.round} of {row.run_id})"


class Budget(NamedTuple):
    """What a run has spent of what it may; ``limit`` is ``None`` where none was set."""

    spent: float | None
    limit: float | None
    delta: float | None
    unit: str

    @property
    def share(self) -> float | None:
        """Spent over limit."""
        if self.spent is None or not self.limit:
            return None
        return self.spent / self.limit


def budget(entry: RunEntry, history: Sequence[Mapping[str, Any]]) -> Budget | None:
    """The privacy budget of a run; ``None`` without ``[privacy]``."""
    section = entry.configuration.get("privacy", {})
    if section.get("unit", "none") == "none":
        return None
    spent = next((r["epsilon"] for r in reversed(history) if "epsilon" in r), None)
    return Budget(spent, section.get("epsilon"), section.get("delta"), section["unit"])


class Alert(NamedTuple):
    """Something that somebody should look at.

    Args:
        kind: ``client-offline``, ``not-finite``, ``quorum-missed``, ``budget`` or ``run-failed``.
        subject: the client or run; an alert is raised once for each.
        text: for a person.
    """

    kind: str
    subject: str
    text: str


BUDGET_SHARE = 0.8
RECENT_SECONDS = 86_400.0


def alerts(source: Source) -> list[Alert]:
    """What is so now: sites that are away, and what went wrong in runs of the last day."""
    found = []
    state = source.server()
    if state is not None and source.folder is not None:
        if state.running:
            for name in source.folder.members():
                if not state.sites.get(name, {}).get("online"):
                    found.append(Alert("client-offline", name, f"site '{name}' is offline"))
        elif any(job.state in ("queued", "running") for job in source.queue()):
            found.append(Alert("server-down", "server", "runs wait and the server does not run"))
    since = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(time.time() - RECENT_SECONDS))
    for entry in source.runs():
        if entry.status != "running" and (entry.finished or entry.started) < since:
            continue
        found += _of_run(entry, source.store.history_json(entry.run_id))
    return found


def _of_run(entry: RunEntry, history: Sequence[Mapping[str, Any]]) -> list[Alert]:
    name, found = entry.run_id, []
    for record in history:
        for failure in record["failures"]:
            if "not finite" in failure["reason"]:
                text = f"round {record['round']} of {name}: update of '{failure['client']}' "
                subject = f"{name}:{failure['client']}"
                found.append(Alert("not-finite", subject, f"{text}rejected, it is not finite"))
    if missed := [r for r in history if r.get("note", "").startswith("quorum missed")]:
        text = f"round {missed[-1]['round']} of {name}: {missed[-1]['note']}"
        found.append(Alert("quorum-missed", f"{name}:{missed[-1]['round']}", text))
    spent = budget(entry, history)
    if spent is not None and spent.share is not None and spent.share >= BUDGET_SHARE:
        share = math.floor(100 * spent.share)
        found.append(Alert("budget", name, f"{name} has spent {share} % of its privacy budget"))
    if entry.status == "failed":
        found.append(Alert("run-failed", name, f"{name} failed: {entry.error}"))
    return list({(a.kind, a.subject): a for a in found}.values())


__all__ = ["Alert", "Source", "UmbelError", "alerts", "budget"]
