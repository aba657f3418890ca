"""Sealed shares: what one member hands to another through a server that must not read it.

A box carries a share of the sender's self-mask seed and a share of its mask key. Its key is used
for this one box (ephemeral keys, directed derivation), hence the fixed nonce; round, graph, source
and destination are authenticated with it.

Source: RFC 8439, ChaCha20-Poly1305.
"""

from __future__ import annotations

import hashlib
import hmac
import struct

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from umbel.privacy.secure_aggregation.refusals import Reason, Refused
from umbel.privacy.secure_aggregation.shamir import SHARE_BYTES

BOX_BYTES = 2 * SHARE_BYTES + 16
TAG_BYTES = 16
_NONCE = bytes(12)


def _bound(graph_digest: bytes, source: int, destination: int) -> bytes:
    return graph_digest + struct.pack(">II", source, destination)


def seal(
    key: bytes, graph_digest: bytes, source: int, destination: int, seed: bytes, mask_key: bytes
) -> bytes:
    """A box of two shares, 33 bytes each, from ``source`` to ``destination``; 82 bytes.

    ``graph_digest`` covers run, round, roster, degree, threshold and graph.
    """
    bound = _bound(graph_digest, source, destination)
    return ChaCha20Poly1305(key).encrypt(_NONCE, seed + mask_key, bound)


def open_box(
    key: bytes, graph_digest: bytes, source: int, destination: int, box: bytes
) -> tuple[bytes, bytes]:
    """The two shares of a box, 33 bytes each.

    Raises:
        Refused: the box was changed, or made for another round, graph or pair.
    """
    try:
        plain = ChaCha20Poly1305(key).decrypt(
            _NONCE, box, _bound(graph_digest, source, destination)
        )
    except InvalidTag:
        raise Refused(
            Reason.TAMPERED_SHARES, f"the shares from member {source} do not open"
        ) from None
    return plain[:SHARE_BYTES], plain[SHARE_BYTES:]


def confirm(key: bytes, graph_digest: bytes, source: int, destination: int) -> bytes:
    """``source`` tells ``destination`` that its vector holds the mask between them; 16 bytes."""
    bound = _bound(graph_digest, source, destination)
    return hmac.digest(key, bound, hashlib.sha256)[:TAG_BYTES]
