"""The gate, without a network: what reaches Flower, and what is read of it."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import MutableMapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL
from sqlalchemy.exc import OperationalError

from umbel.core.messages import BEAT, GIVE, TAKE, read_frames, write_frames
from umbel.server.flower import fleet, link, presence
from umbel.server.flower.fleet import LEAVE, SMALL, Gate

LARGEST = 10 * SMALL


class Behind:
    """What the gate guards: reads the body and says how much there was."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ConnectionError("cut")
            size += len(message.get("body", b""))
            if not message.get("more_body"):
                break
        self.seen.append((scope["path"], size))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"flower"})


class Node:
    """A site's key, and what it signs."""

    def __init__(self) -> None:
        self.key = ec.generate_private_key(ec.SECP384R1())
        public = self.key.public_key()
        self.pem = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)

    def headers(self, *, ago: float = 0.0, stamp: str | None = None) -> dict[str, str]:
        signed = (datetime.now(UTC) - timedelta(seconds=ago)).isoformat()
        signature = self.key.sign(signed.encode(), ec.ECDSA(hashes.SHA256()))
        return {
            "flwr-public-key": base64.b64encode(self.pem).decode(),
            "flwr-signature": base64.b64encode(signature).decode(),
            "flwr-timestamp": stamp or signed,
        }


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gate") / "link.db"


@pytest.fixture(scope="module")
def member(database: Path) -> Node:
    node = Node()
    link.register(database, node.pem, "north")
    return node


@pytest.fixture
def gate(database: Path, member: Node) -> tuple[Gate, Behind]:
    behind = Behind()
    return Gate(behind, link.open_factory(database), LARGEST), behind


def ask(
    gate: Gate, path: str, pieces: list[bytes], headers: dict[str, str], method: str = "POST"
) -> tuple[int, bytes]:
    """One request; its status and body."""
    return asyncio.run(asked(gate, path, pieces, headers, method))


async def asked(
    gate: Gate, path: str, pieces: list[bytes], headers: dict[str, str], method: str = "POST"
) -> tuple[int, bytes]:
    left = list(pieces)
    said: list[MutableMapping[str, Any]] = []

    async def receive() -> MutableMapping[str, Any]:
        body = left.pop(0) if left else b""
        return {"type": "http.request", "body": body, "more_body": bool(left)}

    async def send(message: MutableMapping[str, Any]) -> None:
        said.append(message)

    raw = [(k.encode(), v.encode()) for k, v in headers.items()]
    scope = {"type": "http", "path": path, "method": method, "headers": raw}
    await gate(scope, receive, send)
    return said[0]["status"], said[1]["body"]


def sized(size: int) -> dict[str, str]:
    return {"content-length": str(size)}


PUSH = "/v1/fleet/push-object"


def test_small_requests_reach_flower_and_others_do_not(gate: tuple[Gate, Behind]) -> None:
    door, behind = gate
    assert ask(door, PUSH, [b"x"], sized(1)) == (200, b"flower")
    for path in ("/v1/control/start-run", "/v1/runtime/acquire-task", "/v1/fleet/register-node"):
        assert ask(door, path, [b"x"], sized(1))[0] == 404
    assert ask(door, PUSH, [], {}, method="GET")[0] == 404
    assert ask(door, "/health", [], {}, method="GET") == (200, b"ok")
    assert behind.seen == [(PUSH, 1)]


def test_large_bodies_are_read_for_members_alone(gate: tuple[Gate, Behind], member: Node) -> None:
    door, behind = gate
    large, stranger = [b"x" * SMALL] * 3, Node()
    for headers in (
        {},
        stranger.headers(),
        member.headers(ago=400),
        member.headers(ago=-60),
        member.headers(stamp="2026-01-01T00:00:00+00:00"),
        {**member.headers(), "flwr-signature": "AAAA"},
        {**member.headers(), "flwr-public-key": "not base64"},
    ):
        assert ask(door, PUSH, large, {**sized(3 * SMALL), **headers})[0] == 413
        assert ask(door, PUSH, large, headers)[0] == 413  # no size was declared
    assert not behind.seen
    assert ask(door, PUSH, large, {**sized(3 * SMALL), **member.headers()})[0] == 200
    assert ask(door, PUSH, large, member.headers())[0] == 200
    assert behind.seen == [(PUSH, 3 * SMALL)] * 2
    huge = [b"x" * SMALL] * 11
    assert ask(door, PUSH, huge, {**sized(11 * SMALL), **member.headers()})[0] == 413
    assert ask(door, PUSH, huge, member.headers())[0] == 413


def test_a_declared_size_is_no_promise(gate: tuple[Gate, Behind]) -> None:
    door, behind = gate
    assert ask(door, PUSH, [b"x" * SMALL] * 3, sized(5))[0] == 413
    assert not behind.seen


def test_a_site_that_asks_is_a_member_and_waits_no_longer_than_it_wants(
    gate: tuple[Gate, Behind], member: Node
) -> None:
    door, _ = gate
    body = json.dumps({"wait": 0.05, "have": []}).encode()
    assert ask(door, TAKE, [body], member.headers()) == (200, b"")
    assert ask(door, TAKE, [body], Node().headers())[0] == 401
    assert ask(door, TAKE, [body], {})[0] == 401
    assert ask(door, TAKE, [b"{}"], member.headers())[0] == 400
    for nonsense in (b"", b"\xff" * 40, write_frames([b"\xff"])):
        assert ask(door, GIVE, [nonsense], member.headers())[0] == 400


def test_a_locked_database_is_a_reason_to_ask_again(
    gate: tuple[Gate, Behind], member: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    def locked(*arguments: object) -> None:
        raise OperationalError("UPDATE", {}, Exception("database is locked"))

    monkeypatch.setattr(fleet, "take", locked)
    body = json.dumps({"wait": 0, "have": []}).encode()
    assert ask(gate[0], TAKE, [body], member.headers())[0] == 503


def test_a_sign_of_life_is_a_members_and_written_as_flower_writes_it(database: Path) -> None:
    ours, flowers, stranger = Node(), Node(), Node()
    factory = link.open_factory(database)
    state = factory.state()
    numbers = [link.register(database, node.pem, "") for node in (ours, flowers)]
    door = Gate(Behind(), factory, LARGEST)

    async def beats_and_time() -> None:
        for node, status in ((ours, 200), (ours, 200), (stranger, 401)):
            assert (await asked(door, BEAT, [], node.headers()))[0] == status
        await asyncio.sleep(3 * presence.GATHER)

    for _ in range(2):  # from offline, and from online
        asyncio.run(beats_and_time())
        state.acknowledge_node_heartbeat(numbers[1], HEARTBEAT_DEFAULT_INTERVAL)
        mine, theirs = (state.get_node_info(node_ids=[number])[0] for number in numbers)
        assert mine.status == theirs.status == "online"
        assert abs(mine.online_until - theirs.online_until) < 3 * presence.GATHER + 1
        times = (datetime.fromisoformat(n.last_activated_at) for n in (mine, theirs))
        assert abs((next(times) - next(times)).total_seconds()) < 3 * presence.GATHER + 1
        assert mine.heartbeat_interval == theirs.heartbeat_interval
    link.revoke(database, numbers[0])
    assert ask(door, BEAT, [], ours.headers())[0] == 401
    presence.beat(state, numbers)  # one that was noted before it was shut out
    assert not state.get_node_info(node_ids=[numbers[0]], statuses=["online"])


def test_who_says_farewell_is_not_taken_for_alive_by_an_earlier_sign(database: Path) -> None:
    node = Node()
    number = link.register(database, node.pem, "")
    state = link.open_factory(database).state()

    async def leaves(scope: Any, receive: Any, send: Any) -> None:
        state.deactivate_node(number)
        await Behind()(scope, receive, send)

    door = Gate(leaves, link.open_factory(database), LARGEST)

    async def beats_and_leaves() -> None:
        assert (await asked(door, BEAT, [], node.headers()))[0] == 200
        assert (await asked(door, LEAVE, [b"x"], sized(1)))[0] == 200
        await asyncio.sleep(2 * presence.GATHER)

    asyncio.run(beats_and_leaves())
    [info] = state.get_node_info(node_ids=[number])
    assert info.status == "offline"


def test_signs_of_life_wait_for_a_database_that_is_locked(
    database: Path, member: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[set[int]] = []

    def locked_at_first(state: Any, nodes: set[int]) -> None:
        tried.append(nodes)
        if len(tried) < 3:
            raise OperationalError("UPDATE", {}, Exception("database is locked"))

    monkeypatch.setattr(presence, "beat", locked_at_first)
    monkeypatch.setattr(presence, "GATHER", 0.01)
    door = Gate(Behind(), link.open_factory(database), LARGEST)

    async def beats_and_time() -> None:
        assert (await asked(door, BEAT, [], member.headers()))[0] == 200
        for _ in range(500):
            await asyncio.sleep(0.01)
            if len(tried) == 3:
                break

    asyncio.run(beats_and_time())
    assert len(tried) == 3
    assert tried[0] == tried[1] == tried[2] != set()


def test_the_register_says_what_flower_says(database: Path, member: Node) -> None:
    state, register = link.open_factory(database).state(), presence.Register(database)
    out = Node()
    link.revoke(database, link.register(database, out.pem, ""))
    for node in (member, out, Node()):
        assert register.member(node.pem) == state.get_node_id_by_public_key(node.pem)
    number = register.member(member.pem)
    assert number is not None
    assert not register.waits(number)


def test_frames_are_read_as_they_were_written() -> None:
    frames = [b"", b"a", b"\0" * 300]
    assert read_frames(write_frames(frames)) == frames
    with pytest.raises(ValueError, match="cut short"):
        read_frames(write_frames(frames)[:-1])
