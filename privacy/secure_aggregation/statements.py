"""What is signed and what is committed to, said once for client and server."""

from __future__ import annotations

import hashlib

from umbel.privacy.secure_aggregation.identities import PROTOCOL
from umbel.privacy.secure_aggregation.messages import Survivors

SIGN_REFUSAL = b"refusal"


def seed_digest(graph_digest: bytes, member: int, seed: bytes) -> bytes:
    """What the server compares a rebuilt seed with; a seed has 256 bits, so it shows nothing."""
    head = PROTOCOL + b"\0seed\0" + graph_digest + member.to_bytes(4, "big")
    return hashlib.sha256(head + seed).digest()


def root_digest(graph_digest: bytes, member: int, root: bytes) -> bytes:
    """The same for the root of a member's halves."""
    head = PROTOCOL + b"\0root\0" + graph_digest + member.to_bytes(4, "big")
    return hashlib.sha256(head + root).digest()


def survivors_digest(message: Survivors, graph_digest: bytes) -> bytes:
    """What a consent is to."""
    return hashlib.sha256(PROTOCOL + b"\0survivors\0" + message.signed(graph_digest)).digest()
