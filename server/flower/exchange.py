"""What a message costs one request each way: the Fleet API's ``take`` and ``give``.

Flower's own node asks for a message, then for each of its five parts, and hands in a reply the same
way: forty requests a round and site, each signed and checked, and a poll before each. A site of
Umbel asks once for a message with all its parts, and waits at the door until there is one; and
hands in a reply with all its parts. Same signatures, same link state, same rules.
"""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import quote

from flwr.common.constant import Status
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import PullMessagesResponse, PushMessagesRequest
from flwr.server.superlink.linkstate import LinkState
from flwr.server.superlink.utils import check_abort
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.utils import uint64_to_int64
from google.protobuf.message import DecodeError

from umbel.core.messages import read_frames, write_frames
from umbel.server.flower import objects

LONGEST_WAIT = 20.0
LOOK = 0.02
"""Seconds between two looks for messages, one look for all sites that wait."""
TURN_SECONDS = 5.0
"""How long a request waits for the others that write; as SQLite does for another process's."""

_turn = threading.Lock()


class WrongError(Exception):
    """A request that cannot be served, with its HTTP status."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Bell:
    """Says when there is a message for a node.

    Another process writes the messages; that something was written is asked of the file often, what
    it was only then.

    Args:
        database: the link state's file.
    """

    def __init__(self, database: Path) -> None:
        self._database = database
        self._waiting: dict[int, asyncio.Event] = {}
        self._task: asyncio.Task[None] | None = None

    async def wait(self, node: int, seconds: float) -> None:
        """Returns when there may be a message for ``node``, at the latest after ``seconds``."""
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._ring())
        event = self._waiting.setdefault(node, asyncio.Event())
        try:
            await asyncio.wait_for(event.wait(), seconds)
        except TimeoutError:
            pass
        finally:
            if self._waiting.get(node) is event:
                del self._waiting[node]

    async def _ring(self) -> None:
        uri = f"file:{quote(str(self._database))}?mode=ro"
        with closing(sqlite3.connect(uri, uri=True, timeout=5.0)) as connection:
            version, last_nodes = None, set[int]()
            while self._waiting:
                try:
                    found = connection.execute("PRAGMA data_version").fetchone()
                    if found != version:
                        rows = connection.execute(
                            "SELECT DISTINCT dst_node_id FROM message_ins WHERE delivered_at = ''"
                        ).fetchall()
                        version, last_nodes = found, {int(row[0]) for row in rows}
                except sqlite3.Error:  # locked; soon it is not
                    version = None
                for node, event in list(self._waiting.items()):
                    if uint64_to_int64(node) in last_nodes:
                        event.set()
                await asyncio.sleep(LOOK)


def take(state: LinkState, node: int, have: Sequence[str] | None) -> bytes | None:
    """The next message for a node with all its parts, or nothing.

    Args:
        state: the link state.
        node: who asks.
        have: where it has just started: the messages that it kept. What was given to it before and
            is neither among them nor answered is given again.
    """
    with writing(state):
        if have is not None:
            _put_back(state, node, have)
        for message in state.get_message_ins(node_id=node, limit=1):
            held = objects.load(state, message.metadata.message_id)
            if held is None:
                state.delete_messages({message.metadata.message_id})
                return None
            if not held.whole():  # still being written: the next look has it
                _again(state, message.metadata.message_id)
                return None
            head = PullMessagesResponse(
                messages_list=[message_to_proto(message)], message_object_trees=[held.tree]
            )
            parts = dict.fromkeys(part.object_id for part in iterate_object_tree(held.tree))
            contents = [held.contents[part] for part in parts]
            return write_frames([head.SerializeToString(), *contents])
    return None


def give(state: LinkState, node: int, body: bytes) -> None:
    """Takes a reply with all its parts, whole or not at all.

    Raises:
        WrongError: it is malformed, another node's, or its run is over.
    """
    try:
        head, *contents = read_frames(body)
        request = PushMessagesRequest.FromString(head)
        message = message_from_proto(request.messages_list[0])
        tree = request.message_object_trees[0]
    except (DecodeError, ValueError, IndexError, KeyError, TypeError):
        raise WrongError(400, "malformed") from None
    metadata = message.metadata
    parts = list(dict.fromkeys(part.object_id for part in iterate_object_tree(tree)))
    if metadata.src_node_id != node or tree.object_id != metadata.message_id:
        raise WrongError(403, "not yours")
    if len(parts) != len(contents):
        raise WrongError(400, "malformed")
    with writing(state):
        if not _goes_on(state, metadata.run_id):
            raise WrongError(403, "the run is over")
        if state.store_message_res(message) is None:
            raise WrongError(410, "not wanted any more")
        try:
            given = dict(zip(parts, contents, strict=True))
            objects.store(state, metadata.run_id, tree, given.__getitem__)
        except ValueError:
            raise WrongError(400, "a part is not what its name says") from None
        objects.discard(state, metadata.reply_to_message_id)


@contextmanager
def writing(state: LinkState) -> Iterator[None]:
    """A transaction, one at a time: SQLite lets several wait for each other by sleeping.

    Raises:
        WrongError: the others take too long; the site asks again.
    """
    if not _turn.acquire(timeout=TURN_SECONDS):
        raise WrongError(503, "try again")
    try:
        with state.session():  # type: ignore[attr-defined]
            yield
    finally:
        _turn.release()


def _goes_on(state: LinkState, run_id: int) -> bool:
    """Whether a run is under way. Flower's own check writes each time; it has the last word."""
    running = state.query(  # type: ignore[attr-defined]
        "SELECT 1 FROM run JOIN task ON task.task_id = run.primary_task_id WHERE run.run_id = :run "
        "AND task.running_at IS NOT NULL AND task.finished_at IS NULL",
        {"run": uint64_to_int64(run_id)},
    )
    if running:
        return True
    try:
        return not check_abort(run_id, [Status.PENDING, Status.STARTING, Status.FINISHED], state)
    except KeyError:  # no such run
        return False


def _put_back(state: LinkState, node: int, have: Sequence[str]) -> None:
    holders = {f"h{i}": number for i, number in enumerate(have)}
    kept = ", ".join(f":{name}" for name in holders) or "''"
    state.query(  # type: ignore[attr-defined]
        "UPDATE message_ins SET delivered_at = '' WHERE dst_node_id = :node AND delivered_at <> '' "
        f"AND message_id NOT IN ({kept}) AND created_at + ttl > :now "
        "AND message_id NOT IN (SELECT reply_to_message_id FROM message_res)",
        {"node": uint64_to_int64(node), "now": time.time(), **holders},
    )


def _again(state: LinkState, message_id: str) -> None:
    state.query(  # type: ignore[attr-defined]
        "UPDATE message_ins SET delivered_at = '' WHERE message_id = :id", {"id": message_id}
    )
