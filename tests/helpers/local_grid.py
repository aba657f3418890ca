"""Flower's Grid in one process: runs client apps, and lets a test lose or spoil their replies."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

Tamper: TypeAlias = Callable[[Message, Callable[[], Message]], "Message | None"]
"""(request, what runs the client) -> its reply; None: it never comes."""


def honest(request: Message, run: Callable[[], Message]) -> Message | None:
    """The client's own reply."""
    return run()


class LocalGrid(Grid):
    """Nodes 1000, 1001, …, which run ``app`` when a message is pushed.

    Args:
        app: the client app.
        node_configs: one a node.
        tamper: what becomes of a request and its reply.
        run_config: what every client's context holds.
    """

    def __init__(
        self,
        app: ClientApp,
        node_configs: Iterable[Mapping[str, Any]],
        tamper: Tamper = honest,
        run_config: Mapping[str, Any] | None = None,
    ) -> None:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
        self.app, self.tamper = app, tamper
        self.nodes = {1000 + i: dict(config) for i, config in enumerate(node_configs)}
        self.run_config = dict(run_config or {})
        self.replies: dict[str, Message] = {}
        self.pushed: list[Message] = []
        self.delay: dict[int, float] = {}
        """Node -> seconds until its replies can be pulled."""
        self._ready: dict[str, float] = {}
        self.states: dict[int, RecordDict] = {}
        """Node -> what it keeps between messages."""

    def set_run(self, run: Run) -> None:
        raise AssertionError("not used")

    @property
    def run(self) -> Run:
        return Run.create_empty(1)

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid.uuid4())
            ids.append(message.metadata.message_id)
            self.pushed.append(message)
            reply = self.tamper(message, lambda m=message: self.answer(m))  # type: ignore[misc]
            if reply is not None:
                self.replies[message.metadata.message_id] = reply
                late = self.delay.get(message.metadata.dst_node_id, 0.0)
                self._ready[message.metadata.message_id] = time.monotonic() + late
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        now = time.monotonic()
        here = [i for i in message_ids if i in self.replies and self._ready[i] <= now]
        return [self.replies.pop(i) for i in here]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        return self.pull_messages(list(self.push_messages(messages)))

    def answer(self, message: Message) -> Message:
        """What the client app answers."""
        node = message.metadata.dst_node_id
        state = self.states.setdefault(node, RecordDict())
        context = Context(1, node, dict(self.nodes[node]), state, dict(self.run_config))
        return self.app(message, context)
