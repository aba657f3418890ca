"""Flower's ``Grid`` on one machine, without its SuperLink: what is pushed is work for a crew.

What differs from Flower's simulation, in all of which its own results depend on chance: replies
come in the order of their messages, so that sums over them are the same in every run; the ids of
nodes are the same in every run; what a node is sent is what the message held when it was pushed; a
node answers its messages in their order; and a message that expired is attributed to its node.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import pickle
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple
from uuid import uuid4

from flwr.app import Error, Message, RecordDict
from flwr.app.message.message import make_message
from flwr.app.metadata import Metadata
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.server.utils.validator import validate_message
from flwr.serverapp import Grid
from flwr.supercore.constant import SYSTEM_MESSAGE_TYPE
from flwr.supercore.date import now
from flwr.supercore.run import Run

from umbel.server.flower.quick_records import quicken

log = logging.getLogger("flwr")

UNAVAILABLE = "the message has expired, was answered before, or was never sent"
PATIENCE = 3600.0
"""Seconds after which a wait looks again at what it waits for."""


@dataclass(frozen=True)
class Died:
    """What a crew answers where the worker ended: why."""

    reason: str


class Work(NamedTuple):
    """One message's work.

    Args:
        node: works of one node are done one after the other, in their order.
        head: makes the first frame when the work's turn comes; ``None``: it is no longer wanted.
        content: the second frame; the same object for all messages of the same content.
        done: is called with the reply and the node's context, or how the worker ended.
    """

    node: int
    head: Callable[[], bytes | None]
    content: bytes
    done: Callable[[tuple[bytes, bytes] | Died | None], None]


class _Batch:
    """Messages that were pushed together, and an event for the last of their answers."""

    def __init__(self) -> None:
        self.ids: list[str] = []
        self.left = 0
        self.done = threading.Event()


@dataclass(slots=True)
class _Sent:
    """A message that was pushed and not pulled yet."""

    place: int
    metadata: Metadata
    batch: _Batch
    reply: bytes | Died | None = None
    answered: bool = False

    @property
    def expires(self) -> float:
        return self.metadata.created_at + self.metadata.ttl


class LocalGrid(Grid):
    """A grid whose nodes are places 0, 1, … of a federation, and answered for by a crew.

    Args:
        run_id: of the run.
        supernodes: how many nodes.
        submit: hands a crew its work; the crew may finish it on another thread.
    """

    def __init__(self, run_id: int, supernodes: int, submit: Callable[[Work], None]) -> None:
        self._run = Run.create_empty(run_id)
        self._submit = submit
        self._nodes = {_node_id(place): place for place in range(supernodes)}
        self._contexts: dict[int, bytes] = {}
        self._sent: dict[str, _Sent] = {}
        self._lock = threading.Lock()
        self._failure: Exception | None = None
        self.counts: Counter[str] = Counter()
        """How many messages of each type were pushed."""
        self.errors = 0
        """How many replies carried an error."""

    def set_run(self, run: Run) -> None:
        """Keeps what is told about the run."""
        self._run = run

    @property
    def run(self) -> Run:
        """What is told about the run: a copy."""
        return copy.copy(self._run)

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """A message, as Flower's older apps make it."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """The ids of all nodes, by their places."""
        return list(self._nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Sends messages; the ids of those that are valid."""
        return self._push(messages).ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies that are there, in the order in which their messages were pushed.

        A message that is unknown or expired has an error for a reply.

        Raises:
            RunError: the crew cannot go on.
        """
        self.check()
        with self._lock:
            known = [(self._sent.get(i), i) for i in dict.fromkeys(message_ids)]
            current = now().timestamp()
            ready = [
                (sent, message_id)
                for sent, message_id in known
                if sent is None or sent.answered or sent.expires <= current
            ]
            for _, message_id in ready:
                self._sent.pop(message_id, None)
        ready.sort(key=lambda pair: pair[0].place if pair[0] is not None else len(known))
        replies = [self._reply(sent, message_id) for sent, message_id in ready]
        self.errors += sum(reply.has_error() for reply in replies)
        return replies

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Sends messages and waits for their replies, at most ``timeout`` seconds.

        Raises:
            RunError: the crew cannot go on.
        """
        batch = self._push(messages)
        del messages
        waiting = dict.fromkeys(batch.ids)
        end = None if timeout is None else time.monotonic() + timeout
        replies: dict[str, Message] = {}
        while waiting and (end is None or time.monotonic() < end):
            limits = [PATIENCE, self._until_one_expires(waiting)]
            if end is not None:
                limits.append(end - time.monotonic())
            batch.done.wait(max(0.0, min(limits)))
            for reply in self.pull_messages(waiting):
                answered = reply.metadata.reply_to_message_id
                replies[answered] = reply
                del waiting[answered]
        return [replies[i] for i in batch.ids if i in replies]

    def fail(self, error: Exception) -> None:
        """Says that the crew cannot go on: whoever waits is told."""
        self._failure = error
        with self._lock:
            for sent in self._sent.values():
                sent.batch.done.set()

    def check(self) -> None:
        """Raises what :meth:`fail` was told."""
        if self._failure is not None:
            raise self._failure

    def _push(self, messages: Iterable[Message]) -> _Batch:
        batch, works = _Batch(), []
        # A strategy sends all nodes one record: it is pickled once, here, so that what a ServerApp
        # does to it later reaches nobody.
        pickled: dict[int, tuple[RecordDict, bytes]] = {}
        for message in messages:
            metadata = message.metadata
            if metadata.reply_to_message_id or metadata.ttl <= 0 or metadata.delivered_at:
                raise ValueError(f"Invalid message: {message}")
            metadata.__dict__["_message_id"] = message_id = str(uuid4())
            problems = validate_message(message, is_reply_message=False)
            if metadata.dst_node_id not in self._nodes:
                problems.append(f"invalid destination node ID {metadata.dst_node_id}")
            if problems:
                log.error("a message was not sent: %s", "; ".join(problems))
                continue
            content = message.content
            if id(content) not in pickled:
                pickled[id(content)] = content, pickle.dumps(content, protocol=5)
            sent = _Sent(0, copy.copy(metadata), batch)
            batch.ids.append(message_id)
            works.append((sent, pickled[id(content)][1]))
        batch.left = len(works)
        if not works:
            batch.done.set()
        with self._lock:
            for sent, _ in works:
                self.counts[sent.metadata.message_type] += 1
                sent.place = self.counts.total()
                self._sent[sent.metadata.message_id] = sent
        for sent, content_bytes in works:
            self._submit(self._work(sent, content_bytes))
        return batch

    def _work(self, sent: _Sent, content: bytes) -> Work:
        node = sent.metadata.dst_node_id
        config = {"partition-id": self._nodes[node], "num-partitions": len(self._nodes)}

        def head() -> bytes | None:
            if sent.expires <= now().timestamp():
                return None
            metadata = copy.copy(sent.metadata)
            metadata.delivered_at = now().isoformat()
            return pickle.dumps((metadata, config, self._contexts.get(node, b"")), protocol=5)

        def done(answer: tuple[bytes, bytes] | Died | None) -> None:
            with self._lock:
                if isinstance(answer, tuple):
                    sent.reply, context = answer
                    if context:
                        self._contexts[node] = context
                    else:
                        self._contexts.pop(node, None)
                else:
                    sent.reply = answer
                # An answer in time stays one, however late it is looked at.
                sent.answered = answer is not None and sent.expires > now().timestamp()
                sent.batch.left -= 1
                if not sent.batch.left:
                    sent.batch.done.set()

        return Work(node, head, content, done)

    def _reply(self, sent: _Sent | None, message_id: str) -> Message:
        if sent is None:
            return _unknown(self._run.run_id, message_id)
        if not sent.answered:
            return _error(sent, ErrorCode.MESSAGE_UNAVAILABLE, UNAVAILABLE)
        if isinstance(sent.reply, Died):
            return _error(sent, ErrorCode.CLIENT_APP_CRASHED, sent.reply.reason)
        assert sent.reply is not None
        reply: Message = pickle.loads(sent.reply)
        asked, told = sent.metadata, reply.metadata
        answers = told.reply_to_message_id == message_id, told.src_node_id == asked.dst_node_id
        if not all(answers) or reply.has_content() == reply.has_error():
            log.error("node %d sent what is no reply to its message", asked.dst_node_id)
            return _error(sent, ErrorCode.UNKNOWN, "not a reply to the message")
        reply.metadata.delivered_at = now().isoformat()
        if reply.has_content():
            quicken(reply.content)
        return reply

    def _until_one_expires(self, ids: Iterable[str]) -> float:
        """Seconds until the first of these messages expires."""
        with self._lock:
            ends = [self._sent[i].expires for i in ids if i in self._sent]
        return min(ends) - now().timestamp() if ends else 0.0


def _node_id(place: int) -> int:
    """An id as random as Flower's own, and the same in every run."""
    digest = hashlib.sha256(b"supernode %d" % place).digest()
    return int.from_bytes(digest[:8], "big") >> 1 | 1 << 32


def _error(sent: _Sent, code: int, reason: str) -> Message:
    asked = make_message(sent.metadata, RecordDict())
    reply = Message(Error(code, reason), reply_to=asked)
    reply.metadata.__dict__["_message_id"] = str(uuid4())
    return reply


def _unknown(run_id: int, message_id: str) -> Message:
    metadata = Metadata(
        run_id=run_id,
        message_id=str(uuid4()),
        src_node_id=SUPERLINK_NODE_ID,
        dst_node_id=SUPERLINK_NODE_ID,
        reply_to_message_id=message_id,
        group_id="",
        created_at=now().timestamp(),
        ttl=0,
        message_type=SYSTEM_MESSAGE_TYPE,
    )
    error = Error(ErrorCode.MESSAGE_UNAVAILABLE, UNAVAILABLE)
    return make_message(metadata, error=error)
