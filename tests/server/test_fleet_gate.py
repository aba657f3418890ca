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
from sqlalchemy.exc import OperationalError

from umbel.core.messages import GIVE, TAKE, read_frames, write_frames
from umbel.server.flower import fleet, link
from umbel.server.flower.fleet import SMALL, Gate

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
    left = list(pieces)
    said: list[MutableMapping[str, Any]] = []

    async def receive() -> MutableMapping[str, Any]:
        body = left.pop(0) if left else b""
        return {"type": "http.request", "body": body, "more_body": bool(left)}

    async def send(message: MutableMapping[str, Any]) -> None:
        said.append(message)

    raw = [(k.encode(), v.encode()) for k, v in headers.items()]
    scope = {"type": "http", "path": path, "method": method, "headers": raw}
    asyncio.run(gate(scope, receive, send))
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
    body = json.dumps({"wait": 0}).encode()
    assert ask(gate[0], TAKE, [body], member.headers())[0] == 503


def test_frames_are_read_as_they_were_written() -> None:
    frames = [b"", b"a", b"\0" * 300]
    assert read_frames(write_frames(frames)) == frames
    with pytest.raises(ValueError, match="cut short"):
        read_frames(write_frames(frames)[:-1])
