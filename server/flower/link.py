"""Flower's link state, as the server's own processes use it: who may connect, and a grid over it.

Two processes share the file: the one that faces the sites (:mod:`umbel.server.flower.fleet`) and
the one that carries out a run. There is no Control and no Runtime API between them that anybody
could reach: whoever may write the file is the server.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.app.message.message import make_message
from flwr.common.constant import (
    HEARTBEAT_DEFAULT_INTERVAL,
    NOOP_ACCOUNT_NAME,
    NOOP_FLWR_AID,
    SUPERLINK_NODE_ID,
    SubStatus,
)
from flwr.server.superlink.linkstate import LinkState, LinkStateFactory
from flwr.serverapp import Grid
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.config_loader import (
    get_federation_manager,
    get_objectstore_linkstate_factories,
)
from sqlalchemy import make_url

from umbel.core import seal
from umbel.core.messages import BROKEN_SEAL, MANIFEST, OTHER_NAME
from umbel.core.seal import SEAL, BrokenSealError
from umbel.server.flower import objects

BEAT_SECONDS = 15.0
"""How often a run says that it still goes on; Flower gives it up after 60 s."""

PAUSE = 0.05
LOOK_SECONDS = 1.0
"""At the latest after which Flower is asked, who then also says whom it has lost."""

log = logging.getLogger("umbel.server")


class Node(NamedTuple):
    """A site's connection.

    Args:
        node_id: Flower's.
        online: whether its heartbeat was heard in time.
        seen: until when it counts as online, seconds since 1970.
    """

    node_id: int
    online: bool
    seen: float


class Peer(NamedTuple):
    """Who is behind a node: the site's name and raw Ed25519 public key."""

    name: str
    identity: bytes


def open_factory(database: Path) -> LinkStateFactory:
    """The link state in this file, made where it is missing."""
    logging.getLogger("flwr").setLevel(logging.ERROR)
    _, factory = get_objectstore_linkstate_factories(str(database), get_federation_manager())
    factory.state()
    return factory


def register(database: Path, public_key: bytes, name: str) -> int:
    """Lets a node in.

    Args:
        database: the link state's file.
        public_key: EC P-384, PEM.
        name: of the site.

    Returns:
        its id.
    Raises:
        ValueError: the key is in use.
    """
    return admit(open_factory(database).state(), public_key, name)


def admit(state: LinkState, public_key: bytes, name: str) -> int:
    """As :func:`register`, in a link state that is open: hundreds take no longer than one."""
    known = state.get_node_id_by_public_key(public_key)
    if known is not None:
        raise ValueError("this key is in use")
    node_id = state.create_node(
        NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, public_key, HEARTBEAT_DEFAULT_INTERVAL, name=name
    )
    # Known from the start: a site says that it is there by heartbeats alone, also after a crash.
    state.activate_node(node_id, HEARTBEAT_DEFAULT_INTERVAL)
    state.deactivate_node(node_id)
    return node_id


def revoke(database: Path, node_id: int) -> None:
    """Shuts a node out; its next request is refused."""
    state = open_factory(database).state()
    with contextlib.suppress(ValueError):  # it is out already
        state.delete_node(NOOP_FLWR_AID, node_id)


def nodes(state: LinkState) -> dict[int, Node]:
    """All nodes that are let in, by id."""
    return {
        info.node_id: Node(info.node_id, info.status == "online", info.online_until)
        for info in state.get_node_info(statuses=["registered", "online", "offline"])
    }


@contextlib.contextmanager
def running(state: LinkState) -> Iterator[Run]:
    """A run as Flower sees it: for as long as the block lasts, and no other beside it.

    What an earlier process left unfinished is stopped, so that no site works for nobody.
    """
    for left in state.get_run_info(statuses=["pending", "starting", "running"]):
        state.stop_run(left.run_id)
    number = state.create_run(
        "umbel/run", "1.0.0", "", {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, TaskType.SERVER_APP
    )
    run = state.get_run_info(run_ids=[number])[0]
    assert run.primary_task_id is not None
    task = run.primary_task_id
    state.claim_task(task)
    state.activate_task(task)
    TaskIdentity.task_id, TaskIdentity.run_id = task, number
    TaskIdentity.node_id = SUPERLINK_NODE_ID
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(BEAT_SECONDS):
            try:
                state.acknowledge_task_heartbeat(task)
            except Exception:  # a locked database now; the next beat is soon
                log.exception("the run's heartbeat failed")

    thread = threading.Thread(target=beat, name="run-heartbeat", daemon=True)
    thread.start()
    try:
        yield run
    finally:
        ended.set()
        thread.join()
        state.finish_task(task, SubStatus.COMPLETED, "")
        state.cleanup_run(number)


class Heard(NamedTuple):
    """A site's sealed answer.

    Args:
        site: who.
        kind: of the message that it answers.
        group: of that message: the round, as text.
        sent: when it was asked, seconds since 1970.
        done: when its answer was whole.
        bytes_down: of what it was sent.
        bytes_up: of its answer.
        versions: what it has installed, where it was greeted.
        hardware: what its machine is, where it was greeted and tells.
    """

    site: str
    kind: str
    group: str
    sent: float
    done: float
    bytes_down: int
    bytes_up: int
    versions: Mapping[str, str]
    hardware: Mapping[str, str]


REPORTED = ("umbel", "flwr", "torch", "numpy")
"""Whose versions a site tells."""
HARDWARE = ("cpu", "memory", "gpu", "system")
"""What it tells of its machine."""
LONGEST = 100
"""Characters of such a word."""


def _nobody(heard: Heard) -> None:
    """Nobody listens."""


class LinkGrid(Grid):
    """Flower's ``Grid`` over the link state, in which all that is sent is sealed.

    Every request carries the server's seal, and every reply must carry its site's: a reply without
    is an error, and so is one under another site's name.

    Args:
        state: the link state.
        run: as :func:`running` gives it.
        job: what the queue calls the run.
        key: the server's manifest key.
        peers: node -> who is behind it. Other nodes are not seen.
        refused: called with (site, text) for each reply that was not taken, and each refusal.
        heard: called with each answer that was.
    """

    def __init__(
        self,
        state: LinkState,
        run: Run,
        job: str,
        key: Ed25519PrivateKey,
        peers: Mapping[int, Peer],
        refused: Callable[[str, str], None],
        heard: Callable[[Heard], None] = _nobody,
    ) -> None:
        self._state = state
        self._run = run
        self._job = job
        self._key = key
        self._peers = peers
        self._refused = refused
        self._heard = heard
        self._asked: dict[str, tuple[str, float, int]] = {}  # id -> group, when, bytes
        self._sent: dict[str, tuple[int, str, str]] = {}  # id -> node, kind, nonce
        self._incomplete: dict[str, Message] = {}
        url = make_url(state.database_url)  # type: ignore[attr-defined]
        self._replies = _Replies(Path(str(url.database)))

    def set_run(self, run: Run) -> None:
        """The run is given once, at the start."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run, as Flower sees it."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """A message of this run."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """The sites that are online now."""
        return [node for node in self._state.get_nodes(self._run.run_id) if node in self._peers]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Seals and stores messages; their ids, empty where the site was shut out."""
        batch = list(messages)
        with self._state.session():  # type: ignore[attr-defined]
            return [self._push(message, len(batch)) for message in batch]

    def _push(self, message: Message, asked: int) -> str:
        metadata = message.metadata
        peer = self._peers.get(metadata.dst_node_id)
        if peer is None:
            return ""
        text = seal.seal(
            self._key,
            plain(message.content),
            kind=metadata.message_type,
            job=self._job,
            group=metadata.group_id,
            site=peer.name,
            asked=asked,
            seconds=metadata.ttl,
        )
        message.content[SEAL] = ConfigRecord({SEAL: text})
        with no_object_id_recompute():
            number = message.object_id
            metadata.__dict__["_message_id"] = number
            parts, tree = get_all_nested_objects(message), get_object_tree(message)
            if self._state.store_message_ins(remove_content_from_message(message)) is None:
                return ""
            run = self._run.run_id
            objects.store(self._state, run, tree, lambda name: parts[name].deflate())
        nonce = json.loads(json.loads(text)["seal"])["nonce"]
        self._sent[number] = (metadata.dst_node_id, metadata.message_type, nonce)
        self._asked[number] = (metadata.group_id, time.time(), _size(plain(message.content)))
        return number

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies to these messages that are whole by now; each once."""
        if not self._incomplete and not self._replies.may_be_there():
            return []
        with self._state.session():  # type: ignore[attr-defined]
            return self._pull(message_ids)

    def _pull(self, message_ids: Iterable[str]) -> list[Message]:
        wanted = set(message_ids) - {
            m.metadata.reply_to_message_id for m in self._incomplete.values()
        }
        found = self._state.get_message_res(wanted, self._run.run_id) if wanted else []
        for message in found:
            self._incomplete[message.metadata.message_id] = message
        taken = []
        for number, message in list(self._incomplete.items()):
            if message.has_error():
                reply: Message | None = message
            else:
                reply = self._whole(number, message)
            if reply is None:
                continue
            del self._incomplete[number]
            taken.append(self._checked(reply))
            self._sent.pop(message.metadata.reply_to_message_id, None)
            self._asked.pop(message.metadata.reply_to_message_id, None)
        self._state.delete_messages({m.metadata.reply_to_message_id for m in taken})
        return taken

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Sends, and waits for all replies or for ``timeout`` seconds."""
        waiting = {number for number in self.push_messages(messages) if number}
        until = float("inf") if timeout is None else time.monotonic() + timeout
        replies: list[Message] = []
        while waiting and time.monotonic() < until:
            found = list(self.pull_messages(waiting))
            waiting -= {m.metadata.reply_to_message_id for m in found}
            replies.extend(found)
            if not found:
                time.sleep(PAUSE)
        return replies

    def _whole(self, number: str, message: Message) -> Message | None:
        """The reply with its content, or nothing while its site is still sending it."""
        held = objects.load(self._state, number)
        if held is None:
            return _failed(message, BROKEN_SEAL)
        if not held.whole():
            return None
        objects.discard(self._state, number)
        try:
            whole = inflate_object_from_contents(number, held.contents)
            assert isinstance(whole, Message)
        except Exception:  # whatever a site sends must not end the run
            return _failed(message, BROKEN_SEAL)
        whole.metadata.__dict__["_message_id"] = number
        return whole

    def _checked(self, message: Message) -> Message:
        node, kind, nonce = self._sent.get(message.metadata.reply_to_message_id, (0, "", ""))
        peer = self._peers.get(node)
        if message.has_error() or peer is None:
            return message
        try:
            records = plain(message.content)
            seal.open_seal(
                records.get(SEAL, {}).get(SEAL),
                peer.identity,
                records,
                kind=kind,
                site=peer.name,
                answers=nonce,
            )
        except BrokenSealError as broken:
            self._refused(peer.name, f"its reply was not taken: {broken}")
            return _failed(message, BROKEN_SEAL)
        try:
            table = json.loads(records[MANIFEST][MANIFEST])
            said, error = table.get("client"), table.get("error")
        except (KeyError, TypeError, ValueError, AttributeError):
            table, said, error = {}, None, None
        if said is not None and said != peer.name:
            self._refused(peer.name, f"its reply was not taken: it calls itself {said!r}")
            return _failed(message, OTHER_NAME)
        if error == "policy":
            self._refused(peer.name, f"refused by its policy ({table.get('exception')})")
        elif error is None:
            group, sent, down = self._asked[message.metadata.reply_to_message_id]
            versions = _told(table.get("versions"), REPORTED)
            hardware = _told(table.get("hardware"), HARDWARE)
            now, up = time.time(), _size(records)
            self._heard(Heard(peer.name, kind, group, sent, now, down, up, versions, hardware))
        return message


def _told(said: object, names: Sequence[str]) -> dict[str, str]:
    """What a site says of itself, of which nothing is believed."""
    table = said if isinstance(said, dict) else {}
    return {name: str(table[name])[:LONGEST] for name in names if name in table}


class _Replies:
    """Whether it is worth asking Flower for replies, which it answers by a dozen statements."""

    def __init__(self, database: Path) -> None:
        uri = f"file:{quote(str(database))}?mode=ro"
        self._connection = sqlite3.connect(uri, uri=True, timeout=0.0, check_same_thread=False)
        self._version: object = None
        self._next = 0.0

    def may_be_there(self) -> bool:
        """True where one is, and every second."""
        if (now := time.monotonic()) >= self._next:
            self._next = now + LOOK_SECONDS
            return True
        try:
            [version] = self._connection.execute("PRAGMA data_version").fetchone()
            if version == self._version:
                return False
            query = "SELECT 1 FROM message_res WHERE delivered_at = '' LIMIT 1"
            found = self._connection.execute(query).fetchone() is not None
        except sqlite3.Error:  # locked; Flower waits until it is not
            return True
        if not found:
            self._version = version
        return found


def _size(records: seal.Records) -> int:
    """Bytes of the values, without names and frames."""
    values = (value for record in records.values() for value in record.values())
    return sum(len(value) if isinstance(value, bytes | str) else 8 for value in values)


def plain(content: RecordDict) -> seal.Records:
    """A message's records as plain values.

    Raises:
        BrokenSealError: a record of another kind, which Umbel never sends.
    """
    if len(content.config_records) != len(content):
        raise BrokenSealError("it holds something else than values")
    return {name: dict(record) for name, record in content.config_records.items()}


def _failed(message: Message, code: int) -> Message:
    return make_message(message.metadata, error=Error(code, ""))
