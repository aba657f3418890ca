"""A site's side of Flower's Fleet API: protobuf over HTTPS, signed with the node's key.

What Flower's own node does differently: it is ended by a clock that is ten seconds off, by a server
that is restarted and by one that is busy; here each is waited out. A response is read up to a bound
and no further, redirects are not followed, and no app is ever fetched.
"""

from __future__ import annotations

import hashlib
import json
import ssl
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple, Protocol, TypeVar

import httpx
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_ssh_private_key,
)
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL, TIMESTAMP_HEADER
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto import fleet_pb2, heartbeat_pb2, message_pb2
from flwr.proto.node_pb2 import Node
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from google.protobuf.message import DecodeError
from google.protobuf.message import Message as Proto

from umbel.core.messages import BEAT, GIVE, TAKE, read_frames, write_frames

MEDIA = "application/protobuf"
SMALL = 1 << 20
"""Bytes of a response that carries no object."""
BEAT_TIMEOUT = 5.0
BEAT_SECONDS = 8.0
"""Between two signs of life; without one for a minute, the server gives the site up for a round."""
TAKE_SECONDS = 60.0
"""How long a message may take to arrive, beside the wait for one."""
OBJECT_SECONDS = 60.0
"""How long an object that the server has not stored yet is waited for."""


class _Parsed(Protocol):
    def ParseFromString(self, serialized: bytes) -> int: ...


P = TypeVar("P", bound=_Parsed)


class LostError(Exception):
    """The server cannot be reached now, or says that it is busy; worth another try."""


class DeniedError(Exception):
    """The server does not know this site (any more)."""


class GoneError(Exception):
    """What is asked about is over: the run has ended, the message has expired."""


class TooLargeError(Exception):
    """The server sends more than the site allows."""


class Delivery(NamedTuple):
    """A message on its way.

    Args:
        message: without content.
        tree: what the content consists of.
        contents: the parts that came with it, by name; none: they are to be fetched.
    """

    message: Message
    tree: message_pb2.ObjectTree
    contents: dict[str, bytes]


class Fleet:
    """A connection to a server; one thread at a time calls everything but :meth:`beat`.

    Args:
        server: ``host:port``.
        authority: PEM; the only one that may vouch for the server.
        key: the node's key, EC P-384 in OpenSSH's format.
        node_id: what the server calls the node.
        timeout: seconds for one request, without progress.
    """

    def __init__(
        self, server: str, authority: bytes, key: bytes, node_id: int, *, timeout: float = 30.0
    ) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_verify_locations(cadata=authority.decode("ascii"))
        loaded = load_ssh_private_key(key, password=None)
        if not isinstance(loaded, ec.EllipticCurvePrivateKey):
            raise ValueError("the node's key is not on an elliptic curve")
        self._key = loaded
        pem = loaded.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        self._public = b64encode(pem).decode("ascii")
        self._node = Node(node_id=node_id)
        self._skew = timedelta()
        self._plain = False  # whether the server is Flower's own, without take and give
        self._client = httpx.Client(
            base_url=f"https://{server}",
            verify=context,
            timeout=httpx.Timeout(timeout, connect=min(timeout, 10.0)),
            follow_redirects=False,
            trust_env=False,
            limits=httpx.Limits(max_keepalive_connections=4, keepalive_expiry=60.0),
        )

    @property
    def skew(self) -> timedelta:
        """By how much the server's clock is ahead, where it had to be corrected for."""
        return self._skew

    def close(self, *, leave: bool = True) -> None:
        """Hangs up; says before that the site leaves, where anybody listens."""
        try:
            if not leave:
                return
            request = fleet_pb2.DeactivateNodeRequest(node_id=self._node.node_id)
            self._call("deactivate-node", request, fleet_pb2.DeactivateNodeResponse, timeout=2.0)
        except (LostError, DeniedError, GoneError, TooLargeError):
            pass
        finally:
            self._client.close()

    def beat(self) -> None:
        """Says that the site is there.

        Raises:
            LostError, DeniedError.
        """
        if not self._plain:
            try:
                self._request(BEAT, b"", SMALL, BEAT_TIMEOUT)
                return
            except GoneError:
                self._plain = True
        request = heartbeat_pb2.SendNodeHeartbeatRequest(
            node=self._node, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL
        )
        reply = self._call(
            "send-node-heartbeat",
            request,
            heartbeat_pb2.SendNodeHeartbeatResponse,
            timeout=BEAT_TIMEOUT,
        )
        if not reply.success:
            raise DeniedError("the server does not know this site")

    def next(self) -> Delivery | None:
        """The next message, still without content; ``None``: there is no work.

        Raises:
            LostError, DeniedError.
        """
        request = fleet_pb2.PullMessagesRequest(node=self._node)
        reply = self._call("pull-messages", request, fleet_pb2.PullMessagesResponse)
        if not reply.messages_list:
            return None
        message = message_from_proto(reply.messages_list[0])
        return Delivery(message, reply.message_object_trees[0], {})

    def take(self, wait: float, have: Sequence[str] | None, largest: int) -> Delivery | None:
        """The next message with its parts, as soon as there is one; ``None``: there was none.

        A server that is plain Flower is asked by :meth:`next`, which does not wait.

        Args:
            wait: seconds to wait for one.
            have: at the first time after a start or a lost contact: the messages kept here.
            largest: bytes that it may have.
        Raises:
            LostError, DeniedError; TooLargeError: it has more.
        """
        if self._plain:
            return self.next()
        table = {"wait": wait, "have": have}
        body, timeout = json.dumps(table).encode(), wait + TAKE_SECONDS
        try:
            answer = self._request(TAKE, body, largest + SMALL, timeout)
        except GoneError:
            self._plain = True
            return self.next()
        if not answer:
            return None
        try:
            head, *contents = read_frames(answer)
            reply = fleet_pb2.PullMessagesResponse.FromString(head)
            message, tree = reply.messages_list[0], reply.message_object_trees[0]
            parts = dict.fromkeys(part.object_id for part in iterate_object_tree(tree))
            held = dict(zip(parts, contents, strict=True))
        except (ValueError, IndexError, DecodeError):
            raise LostError("the server's message cannot be read") from None
        return Delivery(message_from_proto(message), tree, held)

    def fetch(self, delivery: Delivery, largest: int) -> Message:
        """The message with its content, each part of which has the hash that names it.

        Args:
            delivery: as :meth:`next` gave it.
            largest: bytes that it may have.
        Raises:
            LostError, DeniedError, GoneError; TooLargeError: it has more.
        """
        run_id, number = delivery.message.metadata.run_id, delivery.message.metadata.message_id
        contents: dict[str, bytes] = {}
        left = largest
        for part in iterate_object_tree(delivery.tree):
            if part.object_id not in contents:
                content = delivery.contents.get(part.object_id)
                if content is None:
                    content = self._object(run_id, part.object_id, left)
                left -= len(content)
                if left < 0:
                    raise TooLargeError(f"the message is larger than {largest} bytes")
                if hashlib.sha256(content).hexdigest() != part.object_id:
                    raise GoneError("a part of the message was changed")
                contents[part.object_id] = content
        try:
            whole = inflate_object_from_contents(number, contents)
        except (KeyError, ValueError, TypeError, AttributeError, DecodeError) as error:
            raise GoneError(f"the message is damaged: {type(error).__name__}") from None
        if not isinstance(whole, Message):
            raise GoneError("not a message")
        # What was inflated is what was hashed: the metadata that were beside it do not count.
        whole.metadata.__dict__["_message_id"] = number
        return whole

    def confirm(self, delivery: Delivery) -> None:
        """Says that the message is kept here and need not be kept there; after :meth:`take` no
        word is needed.

        Raises:
            LostError, DeniedError, GoneError.
        """
        if delivery.contents:
            return
        request = message_pb2.ConfirmMessageReceivedRequest(
            node=self._node,
            run_id=delivery.message.metadata.run_id,
            message_object_id=delivery.message.metadata.message_id,
        )
        reply = message_pb2.ConfirmMessageReceivedResponse
        self._call("confirm-message-received", request, reply)

    def send(self, reply: Message, seconds: float) -> None:
        """Sends a reply.

        Args:
            reply: to a message that was fetched.
            seconds: that the work took.
        Raises:
            LostError, DeniedError, GoneError.
        """
        with no_object_id_recompute():
            number = reply.object_id
            reply.metadata.__dict__["_message_id"] = number
            objects, tree = get_all_nested_objects(reply), get_object_tree(reply)
            request = fleet_pb2.PushMessagesRequest(
                node=self._node,
                messages_list=[message_to_proto(remove_content_from_message(reply))],
                message_object_trees=[tree],
                clientapp_runtime_list=[seconds],
            )
            if not self._plain:
                parts = dict.fromkeys(part.object_id for part in iterate_object_tree(tree))
                frames = [request.SerializeToString(), *(objects[p].deflate() for p in parts)]
                self._request(GIVE, write_frames(frames), SMALL, None)
                return
            answer = self._call("push-messages", request, fleet_pb2.PushMessagesResponse)
            for wanted in answer.objects_to_push:
                push = message_pb2.PushObjectRequest(
                    node=self._node,
                    run_id=reply.metadata.run_id,
                    object_id=wanted,
                    object_content=objects[wanted].deflate(),
                    session_id=answer.session_id,
                )
                stored = self._call("push-object", push, message_pb2.PushObjectResponse)
                if not stored.stored:
                    raise LostError("the server did not store a part")

    def _object(self, run_id: int, object_id: str, largest: int) -> bytes:
        request = message_pb2.PullObjectRequest(node=self._node, run_id=run_id, object_id=object_id)
        until, pause = time.monotonic() + OBJECT_SECONDS, 0.02
        while True:
            reply = self._call(
                "pull-object", request, message_pb2.PullObjectResponse, largest=largest + SMALL
            )
            if not reply.object_found:
                raise GoneError("a part of the message is gone")
            if reply.object_available:
                break
            if time.monotonic() > until:
                raise GoneError("a part of the message never came")
            time.sleep(pause)
            pause = min(2 * pause, 1.0)
        content: bytes = reply.object_content
        return content

    def _call(
        self,
        name: str,
        request: Proto,
        kind: type[P],
        *,
        largest: int = SMALL,
        timeout: float | None = None,
    ) -> P:
        body = request.SerializeToString(deterministic=True)
        content = self._request(f"/v1/fleet/{name}", body, largest, timeout)
        reply = kind()
        try:
            reply.ParseFromString(content)
        except DecodeError:
            raise LostError(f"the server's answer to {name} cannot be read") from None
        return reply

    def _request(self, path: str, body: bytes, largest: int, timeout: float | None) -> bytes:
        for attempt in (0, 1):
            status, date, content = self._post(path, body, largest, timeout)
            if status == 401 and attempt == 0 and self._corrected(date):
                continue
            break
        if status == 401:
            raise DeniedError("the server does not know this site's key, or it was revoked")
        if status in (400, 403, 404, 409, 410, 412, 413, 422):
            raise GoneError(f"the server answers {status} to {path}")
        if status != 200:
            raise LostError(f"the server answers {status} to {path}")
        return content

    def _post(
        self, path: str, body: bytes, largest: int, timeout: float | None
    ) -> tuple[int, str, bytes]:
        stamp = (datetime.now(UTC) + self._skew).isoformat()
        signature = self._key.sign(stamp.encode("ascii"), ec.ECDSA(hashes.SHA256()))
        headers = {
            "content-type": MEDIA,
            "accept": MEDIA,
            "accept-encoding": "identity",
            FLEET_HTTP_PUBLIC_KEY_HEADER: self._public,
            FLEET_HTTP_SIGNATURE_HEADER: b64encode(signature).decode("ascii"),
            TIMESTAMP_HEADER: stamp,
        }
        options: dict[str, Any] = {} if timeout is None else {"timeout": timeout}
        try:
            with self._client.stream(
                "POST", path, content=body, headers=headers, **options
            ) as response:
                read, total = [], 0
                for chunk in response.iter_bytes():
                    total += len(chunk)
                    if total > largest:
                        raise TooLargeError(f"an answer of more than {largest} bytes")
                    read.append(chunk)
                return response.status_code, response.headers.get("date", ""), b"".join(read)
        except (httpx.HTTPError, httpx.StreamError, ssl.SSLError, OSError) as error:
            raise LostError(f"{type(error).__name__}: {error}") from None

    def _corrected(self, date: str) -> bool:
        """Whether the server's clock differs from what was assumed, and now is assumed anew."""
        try:
            theirs = parsedate_to_datetime(date)
        except (TypeError, ValueError):
            return False
        found = theirs - datetime.now(UTC)
        if abs((found - self._skew).total_seconds()) < 3.0:
            return False
        self._skew = found
        return True


class Heart:
    """Beats in a thread of its own, on a connection of its own, while the site works.

    Args:
        fleet: not used by anybody else.
        heard: called after each beat that the server answered.
    """

    def __init__(self, fleet: Fleet, heard: Callable[[], object] = lambda: None) -> None:
        self._fleet = fleet
        self._heard = heard
        self._ended = threading.Event()
        self.denied = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        """The first beat is at once."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread, and tells the server that the site leaves."""
        self._ended.set()
        self._thread.join(timeout=10.0)
        self._fleet.close()

    def _run(self) -> None:
        while True:
            pause = BEAT_SECONDS
            try:
                self._fleet.beat()
                self.denied.clear()
                self._heard()
            except DeniedError:
                self.denied.set()
            except (LostError, GoneError, TooLargeError):
                pause = 1.0
            if self._ended.wait(pause):
                return
