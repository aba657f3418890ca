"""A site: one process for as long as it takes part, that connects out and lets nobody in.

It asks its server for work, often while a run is on and seldom else; asks its guard about each
message; has the worker do what is allowed; and answers under its own seal. A server that is away is
waited for. A message is kept on disk from before the server forgets it until it is answered, so
that a site that is killed does the work after all when it is started again.
"""

from __future__ import annotations

import logging
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

from flwr.app import ConfigRecord, Message, RecordDict

from umbel.client.flower.fleet import (
    Delivery,
    DeniedError,
    Fleet,
    GoneError,
    Heart,
    LostError,
    TooLargeError,
)
from umbel.client.flower.site_worker import Work, read_message, write_message, write_work
from umbel.client.folder import Kit, SiteFolder
from umbel.client.guard import REFUSED, Accepted, Guard, Refusal
from umbel.client.policy import read_policy
from umbel.client.worker import Worker, WorkerDiedError
from umbel.core import locks, messages, seal
from umbel.core.errors import InputError
from umbel.core.messages import MANIFEST, MODEL, Problem
from umbel.core.seal import SEAL, Records
from umbel.core.signing import replace_file

WAIT = 20.0
"""Seconds that one request for work waits at the server."""
QUICK, LIVELY = 0.02, 0.25
"""Where the server is plain Flower, which does not let a request wait: seconds between two looks
for work while a run is on, at first and at most."""
LIVELY_SECONDS = 60.0
"""How long after a message a run counts as on."""
SLOWEST_RETRY = 5.0
TRIES = 3
"""How often a message is begun: one that ends the site each time is given up."""

log = logging.getLogger("umbel.site")

T = TypeVar("T")


class Works(Protocol):
    """What does a site's work, as :class:`~umbel.client.worker.Worker`."""

    def warm(self) -> None:
        """Makes ready."""

    def answer(self, document: bytes, seconds: float | None) -> bytes:
        """Carries out a request."""

    def stop(self) -> None:
        """Ends."""


class Served(NamedTuple):
    """What a site did in its life."""

    answered: int
    refused: int


class Site:
    """Takes part until it is interrupted.

    Args:
        folder: of a site that has joined.
        report: called with what an operator should know.
        worker: made of the worker's settings; ``None``: a child process.
    Raises:
        InputError: the site has not joined, its policy is missing, its keys are open to others, or
            it runs already.
    """

    def __init__(
        self,
        folder: SiteFolder,
        report: Callable[[str], None],
        worker: Callable[[dict[str, Any]], Works] | None = None,
    ) -> None:
        if loose := folder.loose():
            raise InputError(
                "others may read the site's private files",
                where=str(loose[0]),
                fix=f"chmod go-rwx {folder.keys} {folder.keys}/*",
            )
        self._folder = folder
        self._settings = folder.settings()
        self._kit = folder.kit()
        self._report = report
        folder.make()
        self._lock = locks.acquire(folder.lock_file)
        if self._lock is None:
            raise InputError(
                "this site runs already", where=str(folder.path), fix="end the other process"
            )
        self._identity = folder.identity()
        self._guard = Guard(folder, self._kit)
        self._inbox = folder.state / "inbox"
        self._inbox.mkdir(mode=0o700, exist_ok=True)
        about = {
            "name": self._settings.name,
            "data": self._settings.data,
            "threads": self._settings.threads,
            "hardware": self._settings.hardware,
            "folder": str(folder.path),
        }
        self._worker: Works = (worker or self._child)(about)
        self._answered = self._refused = 0
        self._trouble: type[Exception] | None = None

    def run(self) -> Served:
        """Works until it is interrupted (Ctrl-C, SIGTERM)."""
        key = self._folder.node_key.read_bytes()
        fleet, heart = self._connect(key), Heart(self._connect(key), self._folder.heard_file.touch)
        heart.start()
        self._report(f"site '{self._settings.name}', server {self._kit.server}")
        try:
            self._worker.warm()
            self._report("ready")
            for message in self._leftovers():
                self._work(fleet, message, begun=True)
            self._look(fleet)
        except KeyboardInterrupt:
            self._report("ended")
        finally:
            self._worker.stop()
            fleet.close(leave=False)
            heart.stop()
            assert self._lock is not None
            self._lock.close()
        return Served(self._answered, self._refused)

    def _child(self, about: dict[str, Any]) -> Worker:
        command = [sys.executable, "-P", "-m", "umbel.client.flower.site_worker"]
        log_file = self._folder.logs / "worker.log"
        return Worker(command, about, log_file, _switches(self._folder))

    def _connect(self, key: bytes) -> Fleet:
        kit: Kit = self._kit
        return Fleet(kit.server, kit.authority, key, kit.node_id)

    def _look(self, fleet: Fleet) -> None:
        """Looks for work and does it, for ever."""
        heard, pause = 0.0, QUICK
        have: Sequence[str] | None = self._kept()
        while True:
            try:
                largest = read_policy(self._folder.policy_file).limits.maximum_bytes
            except InputError as wrong:  # half edited, say: no work is taken meanwhile
                self._report(f"no work without a policy: {wrong}")
                time.sleep(SLOWEST_RETRY)
                continue
            asked = time.monotonic()
            try:
                delivery = fleet.take(WAIT, have, largest)
                have = None
                self._in_touch()
            except (LostError, DeniedError, GoneError, TooLargeError) as error:
                self._out_of_touch(error)
                have = self._kept()  # what was under way to us may be lost: it is sent again
                pause = min(max(2 * pause, 0.2), SLOWEST_RETRY)
                time.sleep(pause * random.uniform(0.8, 1.2))
                continue
            if delivery is not None:
                pause = QUICK
                self._receive(fleet, delivery, largest)
                heard = time.monotonic()
            elif time.monotonic() - asked < WAIT / 2:  # a server that does not let us wait
                lively = time.monotonic() - heard < LIVELY_SECONDS
                pause = min(1.3 * pause, LIVELY if lively else self._settings.idle_seconds)
                time.sleep(pause)

    def _receive(self, fleet: Fleet, delivery: Delivery, largest: int) -> None:
        """Brings a message home, and does what it asks."""
        ends = _ends(delivery.message)
        try:
            message = self._insist(lambda: fleet.fetch(delivery, largest), ends)
            self._keep(message, 1)
            self._insist(lambda: fleet.confirm(delivery), ends)
        except TooLargeError as large:
            self._guard.audit.add(REFUSED, rule="maximum_bytes", reason=str(large))
            self._refuse(fleet, delivery.message, "maximum_bytes")
        except GoneError as gone:
            log.warning("a message was lost: %s", gone)
        else:
            self._work(fleet, message)

    def _work(self, fleet: Fleet, message: Message, *, begun: bool = False) -> None:
        """Decides, works, answers; then forgets the message.

        What an earlier process has begun may have been decided already. For what comes from the
        server, the same would be a replay.
        """
        metadata = message.metadata
        kind = metadata.message_type
        records = plain(message.content)
        began = time.monotonic()
        known = self._guard.known(kind, records) if begun else None
        decision = known or self._guard.decide(kind, records)
        if isinstance(decision, Refusal):
            log.warning("refused %s: %s", kind, decision.problem.exception)
            self._report(f"refused {kind}: {decision.problem.exception}")
            answers = decision.nonce or metadata.message_id
            reply = self._sealed(problem(message, decision.problem), "", answers)
            self._refused += 1
        else:
            reply = self._sealed(
                self._carried_out(message, decision), decision.seal.job, decision.seal.nonce
            )
            self._answered += 1
        try:
            seconds = time.monotonic() - began
            self._insist(lambda: fleet.send(reply, seconds), _ends(message))
        except (GoneError, TooLargeError) as gone:
            log.warning("the answer to %s was not wanted any more: %s", kind, gone)
        self._forget(message)

    def _carried_out(self, message: Message, decision: Accepted) -> Message:
        work = Work(decision.own_parts, decision.maximum_epsilon, decision.seal.job, decision.share)
        left = max(1.0, _ends(message) - time.time())
        try:
            return read_message(self._worker.answer(write_work(work, message), left))
        except WorkerDiedError as died:
            log.error("the worker ended in the middle of %s: %s", message.metadata, died)
            return problem(message, Problem(error="training", exception="WorkerDiedError"))

    def _refuse(self, fleet: Fleet, message: Message, rule: str) -> None:
        reply = problem(message, Problem(error="policy", exception=rule))
        sealed = self._sealed(reply, "", message.metadata.message_id)
        try:
            self._insist(lambda: fleet.send(sealed, 0.0), _ends(message))
        except (GoneError, TooLargeError) as gone:
            log.warning("a refusal was not wanted any more: %s", gone)
        self._refused += 1

    def _sealed(self, reply: Message, job: str, answers: str) -> Message:
        text = seal.seal(
            self._identity,
            plain(reply.content),
            kind=reply.metadata.message_type,
            job=job,
            group=reply.metadata.group_id,
            site=self._settings.name,
            asked=0,
            seconds=max(1.0, reply.metadata.ttl),
            answers=answers,
        )
        reply.content[SEAL] = ConfigRecord({SEAL: text})
        return reply

    def _insist(self, call: Callable[[], T], ends: float) -> T:
        """Calls until the server can be reached, or the message has expired.

        Raises:
            GoneError: it is no longer wanted. TooLargeError: as the call.
        """
        pause = 0.1
        while True:
            try:
                found = call()
                self._in_touch()
                return found
            except (LostError, DeniedError) as error:
                self._out_of_touch(error)
                if time.time() > ends:
                    raise GoneError("its time is over") from None
                log.info("trying again: %s", error)
                time.sleep(pause * random.uniform(0.8, 1.2))
                pause = min(2 * pause, SLOWEST_RETRY)

    def _out_of_touch(self, error: Exception) -> None:
        """Tells the operator, once: a server that is back may know us no more, which is another."""
        if type(error) is not self._trouble:
            self._report(f"no contact: {error}; trying again")
            self._trouble = type(error)

    def _in_touch(self) -> None:
        if self._trouble:
            self._report("the server is back")
            self._trouble = None

    def _keep(self, message: Message, attempt: int) -> None:
        path = self._inbox / f"{message.metadata.message_id}.{attempt}"
        replace_file(path, write_message(message))

    def _kept(self) -> list[str]:
        """The messages that are kept here."""
        return [path.stem for path in self._inbox.iterdir()]

    def _forget(self, message: Message) -> None:
        for path in self._inbox.glob(f"{message.metadata.message_id}.*"):
            path.unlink(missing_ok=True)

    def _leftovers(self) -> Iterator[Message]:
        """Messages that were under way when the process ended."""
        for path in sorted(self._inbox.iterdir(), key=lambda p: p.stat().st_mtime):
            attempt = int(path.suffix[1:]) if path.suffix[1:].isdigit() else TRIES
            try:
                message = read_message(path.read_bytes())
            except Exception:  # half written, or of another version
                path.unlink()
                continue
            path.unlink()
            if attempt < TRIES and _ends(message) > time.time():
                self._keep(message, attempt + 1)
                yield message


def plain(content: RecordDict) -> Records:
    """A message's records as plain values; none where one is of a kind that no seal covers."""
    if len(content.config_records) != len(content):
        return {}
    return {name: dict(record) for name, record in content.config_records.items()}


def problem(message: Message, why: Problem) -> Message:
    """The reply of a site that does not do what it is asked."""
    manifest = ConfigRecord({MANIFEST: messages.write_reply(why)})
    content = RecordDict({MANIFEST: manifest, MODEL: ConfigRecord({MODEL: b""})})
    return Message(content, reply_to=message)


def _ends(message: Message) -> float:
    return message.metadata.created_at + message.metadata.ttl


def _switches(folder: SiteFolder) -> dict[str, str]:
    return {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_HOME": str(folder.state / "flwr"),
        "PYTHONUNBUFFERED": "1",
    }
