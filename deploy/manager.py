"""The run manager: takes runs from the queue, one at a time, and sees each to its end.

A run has a process of its own. One that dies is started again and goes on from its last committed
round; so is one that was under way when the whole server was killed. Only a run that several times
in a row gets no further is given up. Where sites take part at other hours, it waits.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import IO, Any

from umbel.core import signing
from umbel.core.audit_log import AuditLog
from umbel.deploy.jobs import Job, Jobs
from umbel.deploy.server_folder import ServerFolder

TICK = 0.2
ATTEMPTS = 5
"""Starts in a row without a new round, after which a run has failed."""
RETRY_SECONDS = (1.0, 5.0, 15.0, 60.0)
LATER_SECONDS = 300.0
"""Between two starts of a run whose sites take part at other hours; these are not counted."""

COMMAND = (sys.executable, "-P", "-m", "umbel.server.flower.run_process")

STUMBLE_SECONDS = 2.0
STOP_SECONDS = 10.0
"""A run that was stopped has so long to end by itself."""
LAST_WORDS_SECONDS = 10.0

log = logging.getLogger("umbel.server")


class Manager:
    """Runs the queue of a server until it is closed.

    Args:
        folder: the server's.
        report: called with what an administrator should know.
        status: called often with what is going on, as plain values.
        command: what carries out a run.
    """

    def __init__(
        self,
        folder: ServerFolder,
        report: Callable[[str], None],
        status: Callable[[dict[str, Any]], None],
        command: Sequence[str] = COMMAND,
    ) -> None:
        self._folder = folder
        self._command = list(command)
        self._jobs = Jobs(folder.jobs_database)
        self._report = report
        self._status = status
        self._audit = AuditLog(folder.audit_file)
        self._process: subprocess.Popen[str] | None = None
        self._job: Job | None = None
        self._reader: threading.Thread | None = None
        self._events: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._told = ""
        self._stopping = ""
        self._kill_at = 0.0
        self._not_before = 0.0
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="run-manager")

    def start(self) -> None:
        """Begins; a run that was under way comes first."""
        self._thread.start()

    def close(self) -> None:
        """Ends the run's process, whose run goes on at the next start."""
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._closing.wait(TICK):
                try:
                    self._tick()
                except Exception as error:  # a locked database, a full disk: not for ever
                    log.exception("the run manager stumbled")
                    self._report(f"the run manager stumbled: {type(error).__name__}; going on")
                    self._closing.wait(STUMBLE_SECONDS)
        finally:
            self._end_process()

    def _tick(self) -> None:
        self._hear()
        if self._process is not None:
            assert self._job is not None
            self._obey(self._jobs.get(self._job.id))
            if self._process is not None and self._process.poll() is not None:
                if self._reader is not None:  # its last words may not have been read yet
                    self._reader.join(LAST_WORDS_SECONDS)
                self._hear()
                if self._process is not None:  # it died without a word
                    self._over("", f"its process ended with status {self._process.returncode}")
        elif (job := self._next()) is not None and time.monotonic() >= self._not_before:
            self._begin(job)
        jobs = {"job": None if self._job is None else self._job.id}
        self._status(jobs | {"run_pid": None if self._process is None else self._process.pid})

    def _next(self) -> Job | None:
        jobs = self._jobs.list()
        under_way = [job for job in jobs if job.state == "running"]
        for job in under_way:
            if job.wanted:  # it was ordered while nobody was there to obey
                state = "paused" if job.wanted == "pause" else "stopped"
                self._jobs.change(job.id, state=state, wanted="")
                self._not_before = 0.0  # nobody waits to be tried again any more
        left = [job for job in under_way if not job.wanted]
        left += [job for job in jobs if job.state == "queued"]
        return left[0] if left else None

    def _begin(self, job: Job) -> None:
        members = self._folder.members()
        settings = self._folder.settings()
        run = dict(job.run)
        run["run"] = {**run.get("run", {}), "store": str(self._folder.store)}
        table = {
            "database": str(self._folder.link_database),
            "manifest_key": str(self._folder.manifest_key),
            "job": job.id,
            "run": run,
            "text": job.text,
            "resume": job.run_id,
            "peers": {str(m.node_id): (m.name, m.identity.hex()) for m in members.values()},
            "sites": job.sites,
            "wait": float(settings.wait_seconds),
        }
        self._job = self._jobs.change(
            job.id, state="running", attempts=job.attempts + 1, error="", wanted=""
        )
        self._told, self._stopping = "", ""
        self._audit_job("run begins" if not job.run_id else "run goes on")
        with (self._folder.logs / "run.log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                encoding="utf-8",
                env={**os.environ, "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"},
                start_new_session=True,
            )
        self._events = queue.SimpleQueue()
        assert self._process.stdout is not None
        self._reader = threading.Thread(
            target=_listen, args=(self._process.stdout, self._events), daemon=True
        )
        self._reader.start()
        self._tell(json.dumps(table))

    def _hear(self) -> None:
        """Takes note of what the run's process said."""
        while True:
            try:
                event = self._events.get_nowait()
            except queue.Empty:
                return
            if self._job is None:
                continue
            kind = event.get("event")
            if kind == "started":
                # Who died last may have committed a round that it could not speak of any more.
                further = {"attempts": 0} if event["round"] > self._job.round else {}
                self._job = self._jobs.change(
                    self._job.id, run_id=event["run_id"], round=event["round"], **further
                )
                self._report(f"run {event['run_id']} ({self._job.id})")
            elif kind == "round":
                self._job = self._jobs.change(self._job.id, round=event["round"], attempts=0)
                lost = "".join(
                    f"; {f['client']} {f['reason']}" for f in event["record"].get("failures", [])
                )
                self._report(f"round {event['round']}/{event['of']}{lost}")
            elif kind == "sites":
                self._report(f"{len(event['names'])} sites: {', '.join(event['names'])}")
            elif kind == "site":
                self._folder.keep_client(event["site"], event["told"])
            elif kind == "refused":
                self._audit_job("reply", site=event["site"], text=event["text"])
                self._report(f"{event['site']}: {event['text']}")
            elif kind == "ended":
                hopeless = event.get("exit_code") in (2, 3)  # wrong, or refused: it stays so
                later = bool(event.get("later"))
                self._over(event["status"], event.get("error", ""), hopeless=hopeless, later=later)

    def _obey(self, job: Job) -> None:
        if self._stopping and time.monotonic() >= self._kill_at:
            self._send(signal.SIGKILL)  # what is committed stays
        if not job.wanted or job.wanted == self._told:
            return
        self._told = job.wanted
        if job.wanted == "pause":
            self._tell("pause")
            return
        self._stopping, self._kill_at = "stopped", time.monotonic() + STOP_SECONDS
        self._send(signal.SIGINT)

    def _send(self, number: int) -> None:
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _over(
        self, status: str, error: str, *, hopeless: bool = False, later: bool = False
    ) -> None:
        """Enters how the process ended; the run may go on."""
        assert self._job is not None
        job = self._jobs.get(self._job.id)
        if self._stopping:
            status, error = self._stopping, ""
        if status in ("paused", "interrupted"):
            status = "paused"
        final = status in ("paused", "stopped", "finished", "budget_exhausted")
        if not final and not hopeless and (later or job.attempts < ATTEMPTS):
            failed = max(job.attempts, 1)  # a new round has set it to 0
            pause = LATER_SECONDS if later else RETRY_SECONDS[min(failed, len(RETRY_SECONDS)) - 1]
            self._not_before = time.monotonic() + pause
            attempts = 0 if later else job.attempts
            self._jobs.change(job.id, error=f"{error}; trying again", attempts=attempts)
            self._report(f"{job.id}: {error}; trying again in {pause:g} s")
        else:
            state = status if final else "failed"
            self._jobs.change(job.id, state=state, wanted="", error=error)
            self._audit_job(f"run {state}", error=error)
            self._report(f"{job.id} {state}" + (f": {error}" if error else ""))
        self._end_process()

    def _end_process(self) -> None:
        if self._process is not None:
            self._send(signal.SIGTERM)
            try:
                self._process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self._send(signal.SIGKILL)
                self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                with contextlib.suppress(BrokenPipeError):
                    assert stream is not None
                    stream.close()
        self._process, self._job = None, None

    def _tell(self, line: str) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()

    def _audit_job(self, event: str, **facts: Any) -> None:
        assert self._job is not None
        self._audit.add(event, job=self._job.id, run_id=self._job.run_id, **facts)


def write_status(folder: ServerFolder, status: dict[str, Any]) -> None:
    """Writes what `umbel server status` and a dashboard read, in one step."""
    signing.replace_file(folder.status_file, json.dumps(status).encode())


def _listen(stream: IO[str], events: queue.SimpleQueue[dict[str, Any]]) -> None:
    with contextlib.suppress(ValueError, OSError):
        for line in stream:
            try:
                event = json.loads(line)
            except ValueError:  # something that a library printed
                continue
            if isinstance(event, dict):
                events.put(event)
