"""The run store: what every run was, did and made, and the state from which it goes on.

A store is a folder::

    runs/umbel.db                                   who, when, status, every committed round
    runs/20261122-120102-digits-3f9a/
        run.toml                                    the run file as the user wrote it
        run.json · versions.json                    the resolved configuration; what it ran with
        ledger.db · privacy.json                    what was spent of whose privacy, where it counts
        checkpoints/round-000012.safetensors        the last two
        model.safetensors                           the model, when the run has ended

A round is committed when its checkpoint is durable AND its transaction is: first the file, then
{records, name and hash of the file, rounds done}. Rounds between two checkpoints are held back and
committed with the next one. So the store never shows a round that a resumed run would repeat, and a
process killed anywhere loses only rounds that nobody was shown.

The tables may be in PostgreSQL; the folder stays one, and whoever reads models must see it, too.
"""

from __future__ import annotations

import builtins
import contextlib
import json
import os
import secrets
import socket
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from umbel.core import locks
from umbel.core.errors import InputError, RunError, UmbelError
from umbel.core.versions import versions
from umbel.server import checkpoints, entries, journal
from umbel.server.checkpoints import Checkpoint
from umbel.server.database import Database, locate, translated
from umbel.server.entries import Ended, RunEntry
from umbel.server.index import Dispatch, Index

if TYPE_CHECKING:  # torch and pydantic are loaded only where they are used
    from umbel.core.run_file import RunFile
    from umbel.server.records import RoundRecord, RoundResult

PRIVACY = "privacy.json"
ACTOR = "umbel"
"""Who writes the audit entries of runs."""


class RunStore:
    """The runs at ``location``: a folder, or what :func:`umbel.server.database.locate` takes.

    Nothing is made before the first :meth:`create`. One object may write several runs; several
    processes may write one store.

    Raises:
        InputError: ``location`` is another kind of database.
    """

    def __init__(self, location: str | Path) -> None:
        place = locate(str(location))
        self.location = place.shown
        self.folder = place.folder
        self._database = Database(place)
        self._index = Index(self._database)
        self._locks: dict[str, IO[bytes]] = {}
        self._held: dict[str, tuple[builtins.list[RoundRecord], RoundResult]] = {}

    def create(
        self, run: RunFile, *, engine: str, text: str | None = None, base_model: str | None = None
    ) -> str:
        """Enters a new run, which this process now runs, and returns its id.

        The row comes last: a kill before it leaves a folder that no list shows.

        Args:
            run: the resolved run file.
            engine: where its clients live.
            text: the run file as the user wrote it.
            base_model: hash of the parameters that are not trained, where there are any.
        Raises:
            UmbelError: the store cannot be written, or the disk is full.
        """
        now = datetime.now(UTC)
        configuration, made_with = self._configuration(run), versions()
        if base_model is not None:
            made_with["base_model"] = base_model
        with translated(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            while True:
                tail = f"{run.run.name}-{secrets.token_hex(2)}"
                run_id = f"{now.strftime('%Y%m%d-%H%M%S')}-{tail}"
                try:
                    (self.folder / run_id).mkdir()
                    break
                except FileExistsError:
                    continue
            folder = self.folder / run_id
            (folder / "checkpoints").mkdir()
            if text is not None:
                _write_text(folder / "run.toml", text)
            _write_text(folder / "run.json", json.dumps(configuration, indent=2))
            _write_text(folder / "versions.json", json.dumps(made_with, indent=2))
            self._lock(run_id)
            checkpoints.sync_folder(self.folder)
        row = {
            "id": run_id,
            "name": run.run.name,
            "status": "running",
            "engine": engine,
            "started": now.isoformat(timespec="seconds"),
            "seconds": 0.0,
            "rounds_planned": run.run.rounds,
            "rounds_done": 0,
            "configuration": json.dumps(configuration),
            "versions": json.dumps(made_with),
            "engine_plan": "{}",
            "error": "",
            **_process(),
        }
        with self._database.write() as connection:
            journal.create(connection, row)
            journal.note(connection, ACTOR, "run begins", run_id)
        return run_id

    def keep_plan(self, run_id: str, plan: Mapping[str, Any]) -> None:
        """Enters how the engine computes, before the first round that it computed is committed."""
        with self._database.write() as connection:
            journal.update(connection, run_id, {"engine_plan": json.dumps(dict(plan))})

    def keep_privacy(self, run_id: str, report: Mapping[str, Any]) -> None:
        """Writes what a run has spent, for whoever looks at it."""
        with translated(self.folder):
            _write_text(self.folder / run_id / PRIVACY, json.dumps(dict(report), indent=2))

    def privacy(self, run_id: str) -> dict[str, Any] | None:
        """What a run has spent, as it was when it last ended; ``None`` without ``[privacy]``."""
        path = self.folder / run_id / PRIVACY
        if not path.is_file():
            return None
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found

    def commit(self, run_id: str, result: RoundResult, *, checkpoint: bool) -> None:
        """Commits a round with its checkpoint, or holds it back until the next one that has.

        Raises:
            RunError: the disk is full, or the store is locked or broken.
            ValueError: this object does not run ``run_id``, or a round was left out.
        """
        if run_id not in self._locks:
            raise ValueError(f"run {run_id} was neither created nor reopened by this store")
        records = self._held[run_id][0] if run_id in self._held else []
        records.append(result.record)
        self._held[run_id] = (records, result)
        if checkpoint:
            self._flush(run_id)

    def _flush(self, run_id: str) -> None:
        if run_id not in self._held:
            return
        records, result = self._held[run_id]
        number = result.record.round
        folder = self.folder / run_id / "checkpoints"
        name = checkpoints.file_name(number)
        with translated(folder):
            after = Checkpoint(number, result.model, result.state)
            sha256 = checkpoints.write(folder / name, run_id, after)
        with self._database.write() as connection:
            kept = journal.enter(connection, run_id, records, name, sha256)
        del self._held[run_id]
        self._index.wake(run_id)
        for old in folder.iterdir():  # what a killed process left half-written goes, too
            if old.name not in kept:
                old.unlink(missing_ok=True)

    def latest(self, run_id: str) -> Checkpoint | None:
        """The last committed checkpoint, verified; ``None`` before the first.

        Raises:
            RunError: its file is missing or damaged. :meth:`reopen` goes back to the one before.
        """
        with self._database.read() as connection:
            found = journal.checkpoints(connection, run_id)
        if not found:
            return None
        folder = self.folder / run_id / "checkpoints"
        try:
            return checkpoints.read(folder / found[0].file, found[0].sha256)
        except RunError as error:
            for row in found[1:]:
                if checkpoints.is_whole(folder / row.file, row.sha256):
                    resume = f"umbel simulate --resume {run_id} --store {self.location}"
                    error.fix += f", or go on from round {row.round}: {resume}"
            raise

    def reopen(self, run_id: str, run: RunFile | None = None) -> str:
        """This process goes on with ``run_id``. Returns what had to be undone for that, or nothing.

        Where the last checkpoint is damaged and the one before is whole, the rounds after that one
        are dropped in one transaction: the run repeats them, and no record remains that the model
        does not follow from.

        Args:
            run_id: the run, or the beginning of its id.
            run: the configuration to go on with, such as one with more rounds; ``None``: as stored.
        Raises:
            InputError: no such run, or a live process runs it.
            RunError: no checkpoint is whole.
        """
        entry = self.get(run_id)
        run_id = entry.run_id
        with translated(self.folder / run_id):
            free = self._lock(run_id)
        if not free:
            raise InputError(
                f"run {run_id} is running already, in process {entry.pid} on {entry.host}",
                where=f"run store {self.location}",
                fix="wait for it, or end that process",
            )
        try:
            self._held.pop(run_id, None)
            note = self._go_back(run_id, run)
            with translated(self.folder / run_id):
                self._model_file(run_id).unlink(missing_ok=True)  # it would soon be out of date
            return note
        except BaseException:
            self._locks.pop(run_id).close()
            raise

    def _go_back(self, run_id: str, run: RunFile | None) -> str:
        folder = self.folder / run_id / "checkpoints"
        note = ""
        with self._database.write() as connection:
            found = journal.checkpoints(connection, run_id)
            whole = [r for r in found if checkpoints.is_whole(folder / r.file, r.sha256)]
            if found and not whole:
                raise RunError(
                    f"checkpoint '{found[0].file}' is missing or damaged, as is any before",
                    where=str(folder),
                    fix="restore the file from a backup, or start the run anew",
                )
            if found and whole[0] != found[0]:
                last = whole[0].round
                journal.drop_after(connection, run_id, last)
                note = (
                    f"checkpoint '{found[0].file}' is missing or damaged: rounds after "
                    f"{last} are dropped and run again"
                )
            values = {"status": "running", "finished": None, "error": "", **_process()}
            if run is not None:
                configuration = json.dumps(self._configuration(run))
                values |= {"configuration": configuration, "rounds_planned": run.run.rounds}
            journal.update(connection, run_id, values)
            facts = {"note": note} if note else {}
            journal.note(connection, ACTOR, "run goes on", run_id, **facts)
        return note

    def finish(self, run_id: str, status: Ended, *, error: str = "") -> None:
        """Ends a run: commits rounds held back, writes ``model.safetensors``, sets the status.

        Writing may be what failed: then a failed run's held rounds are dropped, and a resumed run
        repeats them.

        Raises:
            RunError: the disk is full, or the store is locked or broken.
            ValueError: this object does not run ``run_id``.
        """
        if run_id not in self._locks:
            raise ValueError(f"run {run_id} was neither created nor reopened by this store")
        if status == "failed":
            with contextlib.suppress(UmbelError):
                self._flush(run_id)
            self._held.pop(run_id, None)
        else:
            self._flush(run_id)
            self.export(run_id, self._model_file(run_id))
        now = datetime.now(UTC).isoformat(timespec="seconds")
        with self._database.write() as connection:
            values = {"status": status, "error": error, "finished": now}
            journal.update(connection, run_id, values)
            facts = {"error": error} if error else {}
            journal.note(connection, ACTOR, f"run {status}", run_id, **facts)
        self._locks.pop(run_id).close()
        self._index.catch_up(run_id)

    def export(self, run_id: str, path: Path) -> bool:
        """Writes the last committed model, under its plain names; false where there is none.

        Raises:
            UmbelError: the checkpoint is damaged, or ``path`` cannot be written.
        """
        last = self.latest(run_id)
        if last is None:
            return False
        with translated(path, "model"):
            checkpoints.write_model(path, last.model)
        return True

    def model_path(self, run_id: str) -> Path:
        """Where the model of an ended run is; there is none before its first committed round.

        Raises:
            InputError: no such run.
        """
        return self._model_file(self.get(run_id).run_id)

    def get(self, run_id: str) -> RunEntry:
        """The run with this id, or the only one whose id begins so.

        Raises:
            InputError: none, or several; the near ones are listed.
        """
        return entries.select(self.list(), run_id, self.location)

    def list(self) -> builtins.list[RunEntry]:
        """All runs, the newest first; none where there is no store."""
        if not self._database.exists():
            return []
        with self._database.read() as connection:
            rows = journal.runs(connection)
        return [
            RunEntry.of_row(row, locks.is_held(self.folder / row["id"] / "lock")) for row in rows
        ]

    def history(self, run_id: str) -> builtins.list[RoundRecord]:
        """The committed rounds, in order."""
        from umbel.server.records import RoundRecord

        return [RoundRecord.from_json(table) for table in self.history_json(run_id)]

    def history_json(self, run_id: str, after: int = 0) -> builtins.list[dict[str, Any]]:
        """The committed rounds after round ``after`` as plain values, without loading torch."""
        with self._database.read() as connection:
            return journal.records(connection, run_id, after)

    def keep_dispatches(self, run_id: str, dispatches: Sequence[Dispatch]) -> None:
        """Enters when real sites were asked and answered, and how much travelled."""
        self._index.keep(run_id, dispatches)

    def close(self) -> None:
        """Closes the database and lets go of the runs: they can be reopened."""
        for lock in self._locks.values():
            lock.close()
        self._locks.clear()
        self._held.clear()
        self._index.close()
        self._database.close()

    def _configuration(self, run: RunFile) -> dict[str, Any]:
        """The run file as plain values; the store's address without a password."""
        table: dict[str, Any] = run.model_dump(mode="json")
        if self._database.place.file is None:
            table["run"]["store"] = self.location
        return table

    def _model_file(self, run_id: str) -> Path:
        return self.folder / run_id / "model.safetensors"

    def _lock(self, run_id: str) -> bool:
        lock = locks.acquire(self.folder / run_id / "lock")
        if lock is not None:
            self._locks[run_id] = lock
        return lock is not None


def _process() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": socket.gethostname()}


def _write_text(path: Path, text: str) -> None:
    checkpoints.replace_file(path, lambda file: file.write_text(text, encoding="utf-8"))
