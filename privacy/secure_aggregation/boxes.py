"""Sealed shares, and the tags by which two members tell each other what the server only carries.

A box carries a share of the sender's self-mask seed, a share of its root, and the sender's half of
the pair's mask key. The key is used for this one box (ephemeral keys, directed derivation), hence
the fixed nonce; round, graph, source and destination are authenticated with it.

Source: RFC 8439, ChaCha20-Poly1305; RFC 2104, HMAC.
"""

from __future__ import annotations

import hmac
import struct
from typing import NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from umbel.privacy.secure_aggregation.refusals import Reason, Refused
from umbel.privacy.secure_aggregation.shamir import SHARE_BYTES

HALF_BYTES = 32
BOX_BYTES = 2 * SHARE_BYTES + HALF_BYTES + 16
TAG_BYTES = 16
_NONCE = bytes(12)
_CONFIRM, _CONSENT = b"confirm", b"consent"


class Contents(NamedTuple):
    """What a box holds: two shares of 33 bytes and half a mask key of 32."""

    seed: bytes
    root: bytes
    half: bytes


def _bound(graph_digest: bytes, source: int, destination: int) -> bytes:
    return graph_digest + struct.pack(">II", source, destination)


def seal(
    key: bytes, graph_digest: bytes, source: int, destination: int, contents: Contents
) -> bytes:
    """A box from ``source`` to ``destination``; 114 bytes.

    ``graph_digest`` covers run, round, roster, degree, threshold and graph.
    """
    bound = _bound(graph_digest, source, destination)
    return ChaCha20Poly1305(key).encrypt(_NONCE, b"".join(contents), bound)


def open_box(
    key: bytes, graph_digest: bytes, source: int, destination: int, box: bytes
) -> Contents:
    """What is in a box.

    Raises:
        Refused: the box was changed, or made for another round, graph, pair or identity.
    """
    try:
        plain = ChaCha20Poly1305(key).decrypt(
            _NONCE, box, _bound(graph_digest, source, destination)
        )
    except InvalidTag:
        raise Refused(
            Reason.TAMPERED_SHARES, f"the shares from member {source} do not open"
        ) from None
    return Contents(
        plain[:SHARE_BYTES], plain[SHARE_BYTES : 2 * SHARE_BYTES], plain[2 * SHARE_BYTES :]
    )


def confirm(key: bytes, graph_digest: bytes, source: int, destination: int) -> bytes:
    """``source`` tells ``destination`` that its vector holds the mask between them; 16 bytes."""
    return _tag(key, _CONFIRM, graph_digest, source, destination)


def consent(key: bytes, survivors_digest: bytes, source: int, destination: int) -> bytes:
    """``source`` tells ``destination`` which survivor set it was shown; 16 bytes."""
    return _tag(key, _CONSENT, survivors_digest, source, destination)


def _tag(key: bytes, purpose: bytes, digest: bytes, source: int, destination: int) -> bytes:
    bound = _bound(purpose + digest, source, destination)
    return hmac.digest(key, bound, "sha256")[:TAG_BYTES]
