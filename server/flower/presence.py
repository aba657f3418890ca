"""Who is a member, and who is there: what hundreds of sites ask of a link state every few seconds.

Flower answers each by a session of SQLAlchemy of its own, and writes each sign of life in a
transaction of its own: with 320 sites that alone kept a processor busy. Here the same questions are
put to the file itself, and signs of life are written together.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import threading
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import quote

from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL, HEARTBEAT_PATIENCE
from flwr.server.superlink.linkstate import LinkState, LinkStateFactory
from flwr.supercore.constant import NodeStatus
from flwr.supercore.date import now
from flwr.supercore.utils import int64_to_uint64, uint64_to_int64
from sqlalchemy.exc import OperationalError

from umbel.server.flower.exchange import WrongError, writing

GATHER = 0.5
"""Seconds for which signs of life are gathered; they count for 60."""

log = logging.getLogger("umbel.server")


class Register:
    """Questions to a link state's file, from any thread; it must have been opened by Flower.

    Args:
        database: the file.
    """

    def __init__(self, database: Path) -> None:
        self._uri = f"file:{quote(str(database))}?mode=ro"
        self._local = threading.local()

    def member(self, key: bytes) -> int | None:
        """The node with this public key (PEM), unless it was shut out.

        Raises:
            sqlite3.OperationalError: the file cannot be read now.
        """
        [found] = self._ask(
            "SELECT (SELECT node_id FROM node WHERE public_key = ? AND status <> ?)",
            (key, str(NodeStatus.UNREGISTERED)),
        )
        return None if found is None else int64_to_uint64(found)

    def waits(self, node: int) -> bool:
        """Whether there is a message that a node has not been given.

        Raises:
            sqlite3.OperationalError: the file cannot be read now.
        """
        [found] = self._ask(
            "SELECT EXISTS (SELECT 1 FROM message_ins WHERE dst_node_id = ? AND delivered_at = '')",
            (uint64_to_int64(node),),
        )
        return bool(found)

    def _ask(self, query: str, values: tuple[object, ...]) -> tuple[int | None]:
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = sqlite3.connect(self._uri, uri=True, timeout=5.0, isolation_level=None)
            self._local.connection = connection
        found: tuple[int | None] = connection.execute(query, values).fetchone()
        return found


class Pulse:
    """Signs of life, of many sites in one transaction.

    Args:
        factory: the link state.
    """

    def __init__(self, factory: LinkStateFactory) -> None:
        self._factory = factory
        self._heard: set[int] = set()
        self._writes = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    def heard(self, node: int) -> None:
        """Notes one; what a crash leaves unwritten is said again in a few seconds."""
        self._heard.add(node)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._gather())

    async def settle(self) -> None:
        """Writes what was noted: who says farewell next must not be taken for alive after it."""
        async with self._writes:
            nodes, self._heard = self._heard, set()
            try:
                if nodes:
                    await asyncio.to_thread(beat, self._factory.state(), nodes)
            except (OperationalError, WrongError):  # locked, or the disk is full: soon it is not
                self._heard |= nodes

    async def _gather(self) -> None:
        while self._heard:
            await asyncio.sleep(GATHER)
            try:
                await self.settle()
            except Exception:
                log.exception("signs of life cannot be written")


def beat(state: LinkState, nodes: Iterable[int]) -> None:
    """Does what ``acknowledge_node_heartbeat`` does, for several nodes.

    Raises:
        OperationalError: the file cannot be written now.
        WrongError: others have been writing for too long.
    """
    moment = now()
    row = {
        "until": moment.timestamp() + HEARTBEAT_PATIENCE * HEARTBEAT_DEFAULT_INTERVAL,
        "interval": HEARTBEAT_DEFAULT_INTERVAL,
        "moment": moment.isoformat(),
        "online": str(NodeStatus.ONLINE),
        "out": str(NodeStatus.UNREGISTERED),
    }
    with writing(state):
        state.query(  # type: ignore[attr-defined]
            "UPDATE node SET online_until = :until, heartbeat_interval = :interval, "
            "last_activated_at = CASE WHEN status <> :online THEN :moment "
            "ELSE last_activated_at END, status = :online "
            "WHERE node_id = :node AND status <> :out",
            [row | {"node": uint64_to_int64(node)} for node in nodes],
        )
