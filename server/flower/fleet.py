"""The one door of a server: Flower's Fleet API behind a gate, and nothing else of Flower.

Control and Runtime APIs, by which anybody who reaches them runs code on every site, are not mounted
at all: not on this port, not on another one. The gate stands before Flower's own checks. It reads
no body that is large, unless a site's key has signed for the request.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import logging
import sqlite3
from collections import defaultdict
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar

import pydantic
import uvicorn
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from fastapi import FastAPI
from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_HEADER, TIMESTAMP_TOLERANCE
from flwr.server.superlink.linkstate import LinkState, LinkStateFactory
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now
from flwr.supercore.error import http_error_translator
from flwr.supercore.protobuf.translation import ProtobufTranslationMiddleware
from flwr.superlink.routers.fleet.node_auth import NodeAuthMiddleware
from flwr.superlink.routers.fleet.router import router
from sqlalchemy.exc import OperationalError
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware

from umbel.core.messages import BEAT, GIVE, TAKE
from umbel.core.settings import NonNegative, Settings
from umbel.server.flower.exchange import LONGEST_WAIT, Bell, WrongError, give, take
from umbel.server.flower.presence import Pulse, Register

Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

A = TypeVar("A")
R = TypeVar("R")

SMALL = 64 * 1024
"""Bytes that a body of anybody may have: all requests but those that carry results."""

OPEN = frozenset(
    f"/v1/fleet/{name}"
    for name in (
        "activate-node",
        "deactivate-node",
        "send-node-heartbeat",
        "pull-messages",
        "push-messages",
        "get-run",
        "get-fab",
        "push-object",
        "pull-object",
        "confirm-message-received",
        "take",
        "give",
        "beat",
    )
)
"""What is reachable. Registering is the administrator's, in person."""

HEALTH = "/health"
LEAVE = "/v1/fleet/deactivate-node"
STILL_MEMBER = 5.0
"""Seconds after which a site that waits for a message must still be a member."""

log = logging.getLogger("umbel.server")


class Member(NamedTuple):
    """Who has signed a request: a node, by its public key (PEM)."""

    node: int
    key: bytes


class TakeRequest(Settings):
    """What a site says when it asks for a message.

    Args:
        wait: seconds that it is willing to wait for one.
        have: where it has just started, or lost contact: the ids of the messages that it kept.
    """

    wait: NonNegative
    have: tuple[str, ...] | None = pydantic.Field(None, strict=False, max_length=1000)


class Door(NamedTuple):
    """Where the server is to be reached.

    Args:
        host: the address to listen on.
        port: the port.
        certificate: PEM.
        key: PEM.
        largest: bytes that a known site's body may have.
    """

    host: str
    port: int
    certificate: Path
    key: Path
    largest: int


class Gate:
    """Lets requests of sites through to Flower, by path, size and signature.

    Args:
        inner: what is guarded.
        factory: the link state: whose keys are known.
        largest: bytes that a member's body may have.
    """

    def __init__(self, inner: Application, factory: LinkStateFactory, largest: int) -> None:
        self._inner = inner
        self._factory = factory
        self._largest = largest
        self._bell = Bell(Path(factory.database))
        self._register = Register(Path(factory.database))
        self._pulse = Pulse(factory)
        # One, since transactions go one by one: many that wait for each other would take all the
        # threads by which requests are checked.
        self._writer = ThreadPoolExecutor(1, "writer")
        self._newest: defaultdict[int, int] = defaultdict(int)
        self._turns: defaultdict[int, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, or the start and end of the server."""
        if scope["type"] == "lifespan":
            await self._inner(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        if scope["path"] == HEALTH and scope["method"] in ("GET", "HEAD"):
            await _answer(send, 200, b"ok")
            return
        if scope["path"] not in OPEN or scope["method"] != "POST":
            await _answer(send, 404, b"not found")
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        declared = headers.get(b"content-length", b"")
        size = int(declared) if declared.isdigit() else None
        ours = scope["path"] in (TAKE, GIVE, BEAT)
        member = None
        if ours or size is None or size > SMALL:
            member = await asyncio.to_thread(self._signer, headers)
        room = SMALL if member is None else self._largest
        if size is not None and size > room:
            log.warning("a body of %d bytes was refused", size)
            await _answer(send, 413, b"too large")
        elif not ours:
            if scope["path"] == LEAVE:
                await self._pulse.settle()
            await self._flowers(scope, receive, send, room)
        elif member is None:
            await _answer(send, 401, b"not a member")
        else:
            await self._ours(scope["path"], member, receive, send, room)

    async def _flowers(self, scope: Scope, receive: Receive, send: Send, room: int) -> None:
        """Flower answers, of a body that is cut off where it becomes too large."""
        read = 0
        cut = False

        async def counted() -> MutableMapping[str, Any]:
            nonlocal read, cut
            message = await receive()
            read += len(message.get("body", b""))
            if read > room:
                cut = True
                return {"type": "http.disconnect"}
            return message

        async def unless_cut(message: MutableMapping[str, Any]) -> None:
            if not cut:
                await send(message)

        try:
            await self._inner(scope, counted, unless_cut)
        except Exception:
            if not cut:
                raise
        if cut:
            await _answer(send, 413, b"too large")

    async def _ours(
        self, path: str, member: Member, receive: Receive, send: Send, room: int
    ) -> None:
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            if len(body) > room:
                await _answer(send, 413, b"too large")
                return
            if not message.get("more_body", False):
                break
        try:
            if path == BEAT:
                self._pulse.heard(member.node)
                answer = b""
            elif path == GIVE:
                await self._written(give, member.node, bytes(body))
                answer = b""
            else:
                answer = await self._taken(member, bytes(body))
        except WrongError as wrong:
            await _answer(send, wrong.status, str(wrong).encode())
        except (OperationalError, sqlite3.OperationalError) as error:
            # Locked, or the disk is full: the site asks again.
            log.warning("%s: %s", path, getattr(error, "orig", error))
            await _answer(send, 503, b"try again")
        except Exception:
            log.exception("%s failed", path)
            await _answer(send, 503, b"try again")
        else:
            await _answer(send, 200, answer)

    async def _taken(self, member: Member, body: bytes) -> bytes:
        """The next message, or an empty answer when the site has waited as long as it wants.

        Of several requests of one site the newest alone is given messages: the others' connections
        may be gone, and what is written to them lost.
        """
        try:
            asked = TakeRequest.model_validate_json(body)
        except pydantic.ValidationError:
            raise WrongError(400, "malformed") from None
        clock = asyncio.get_running_loop().time
        until = clock() + min(asked.wait, LONGEST_WAIT)
        have: Sequence[str] | None = asked.have
        self._newest[member.node] += 1
        number = self._newest[member.node]
        while True:
            async with self._turns[member.node]:
                if self._newest[member.node] != number:
                    return b""
                found = None
                if await asyncio.to_thread(self._waits, member, have):
                    found = await self._written(take, member.node, have)
            left = until - clock()
            if found is not None or left <= 0:
                return found or b""
            have = None
            await self._bell.wait(member.node, min(left, STILL_MEMBER))

    def _waits(self, member: Member, have: Sequence[str] | None) -> bool:
        """Whether there is something to write down; idle sites ask every few seconds."""
        if self._register.member(member.key) != member.node:
            raise WrongError(401, "not a member")  # shut out while it waited
        return have is not None or self._register.waits(member.node)

    async def _written(self, work: Callable[[LinkState, int, A], R], node: int, what: A) -> R:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._writer, work, self._factory.state(), node, what)

    def _signer(self, headers: dict[bytes, bytes]) -> Member | None:
        """The member who has signed the time that the request names, and that is now."""
        try:
            key = base64.b64decode(headers[FLEET_HTTP_PUBLIC_KEY_HEADER.encode()], validate=True)
            signature = base64.b64decode(
                headers[FLEET_HTTP_SIGNATURE_HEADER.encode()], validate=True
            )
            stamp = headers[TIMESTAMP_HEADER.encode()]
            age = (now() - datetime.fromisoformat(stamp.decode("ascii"))).total_seconds()
            public = load_pem_public_key(key)
            if not -SYSTEM_TIME_TOLERANCE < age < TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE:
                return None
            if not isinstance(public, ec.EllipticCurvePublicKey):
                return None
            public.verify(signature, stamp, ec.ECDSA(hashes.SHA256()))
        except (KeyError, ValueError, TypeError, binascii.Error, InvalidSignature):
            return None
        node = self._register.member(key)
        return None if node is None else Member(node, key)


def fleet_app(factory: LinkStateFactory, largest: int) -> Gate:
    """Flower's Fleet API over this link state, behind the gate."""
    app = FastAPI(
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        middleware=[
            Middleware(BaseHTTPMiddleware, dispatch=http_error_translator),
            Middleware(ProtobufTranslationMiddleware),
            Middleware(NodeAuthMiddleware),
        ],
    )
    app.state.linkstate_factory = factory
    app.state.enable_supernode_auth = True
    app.include_router(router)
    return Gate(app, factory, largest)


def fleet_server(factory: LinkStateFactory, door: Door) -> uvicorn.Server:
    """The server, to be run; ``should_exit`` ends it. It is known by no name and no version."""
    config = uvicorn.Config(
        fleet_app(factory, door.largest),
        host=door.host,
        port=door.port,
        ssl_certfile=str(door.certificate),
        ssl_keyfile=str(door.key),
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=1,  # sites that wait for a message ask again
        limit_concurrency=2000,
        ws="none",
        lifespan="off",
    )
    return uvicorn.Server(config)


async def _answer(send: Send, status: int, body: bytes) -> None:
    headers = [(b"content-type", b"text/plain"), (b"content-length", b"%d" % len(body))]
    if status == 413:  # whoever goes on sending is not listened to
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
