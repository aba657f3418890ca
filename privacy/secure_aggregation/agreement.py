"""Keys: what a pair agrees on, and what each member's own secrets become.

A pair's keys come from two X25519 secrets, one of the round's ephemeral keys and one of the pinned
identities: without the first they would be the same in every round, without the second a server
could sit between. All are bound to the round's terms (salt) and to run, round, pair and purpose
(info), so that no key serves two ends.

The mask of a pair comes from two halves. Each member draws a root for the round and gives every
neighbour that neighbour's half in its sealed box. The root is shared out and opened if the member
is lost; the half of the other side is then unwrapped with the half that the root gives. Nothing
that is ever opened outlives the round.

Source: RFC 7748 (X25519), RFC 5869 (HKDF); NIST SP 800-56A, section 6.1.1.2 (unified model: an
ephemeral and a static secret, hashed together).
"""

from __future__ import annotations

import hmac
import struct
from typing import NamedTuple

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from umbel.privacy.secure_aggregation.identities import PROTOCOL
from umbel.privacy.secure_aggregation.refusals import Reason, Refused


def hkdf(secret: bytes, salt: bytes, info: bytes, size: int = 32) -> bytes:
    """HKDF-SHA256, extract and expand; ``size`` bytes."""
    return HKDF(hashes.SHA256(), size, salt, info).derive(secret)


class PairKeys(NamedTuple):
    """The keys of a pair in one round, 32 bytes each.

    up: of the box from the lower member to the higher. down: of the other. tags: of all tags.
    """

    up: bytes
    down: bytes
    tags: bytes

    def box(self, source: int, destination: int) -> bytes:
        """The key of the box from ``source`` to ``destination``."""
        return self.up if source < destination else self.down


class RoundKeys:
    """Derives the keys of one round.

    Args:
        run: 16 bytes.
        round_number: from 0 to 2**32 - 1.
        terms_digest: 32 bytes, the digest of all that the round was agreed on.
    """

    def __init__(self, run: bytes, round_number: int, terms_digest: bytes) -> None:
        self._prefix = PROTOCOL + b"\0" + run + struct.pack(">I", round_number)
        self._salt = terms_digest

    def pair(self, secret: bytes, a: int, b: int) -> PairKeys:
        """The keys of the pair {a, b}; the same from both sides."""
        info = self._prefix + struct.pack(">II", min(a, b), max(a, b)) + b"pair"
        keys = hkdf(secret, self._salt, info, 96)
        return PairKeys(keys[:32], keys[32:64], keys[64:])

    def half(self, root: bytes, source: int, destination: int) -> bytes:
        """What ``source``, whose root it is, adds to the mask key that it has with another."""
        return self._expand(root, source, destination, b"half of a mask key")

    def mask(self, halves: tuple[bytes, bytes], a: int, b: int) -> bytes:
        """The key of the mask between ``a`` and ``b``; ``halves`` are a's and b's."""
        joined = halves[0] + halves[1] if a < b else halves[1] + halves[0]
        return self._expand(joined, min(a, b), max(a, b), b"pairwise mask")

    def wrap(self, half: bytes, other: bytes, source: int, destination: int) -> bytes:
        """``source``'s ``half``, readable with the ``other`` half, that of ``destination``.

        Its own inverse: the same call takes the wrapping off.
        """
        pad = self._expand(other, source, destination, b"wrap")
        return (int.from_bytes(half, "big") ^ int.from_bytes(pad, "big")).to_bytes(32, "big")

    def self_mask(self, seed: bytes, member: int) -> bytes:
        """The key of a member's own mask."""
        return self._expand(seed, member, member, b"self mask")

    def _expand(self, secret: bytes, a: int, b: int, purpose: bytes) -> bytes:
        # HKDF-Expand of a uniform secret; of 32 bytes it is one HMAC (RFC 5869, section 2.3).
        info = self._salt + self._prefix + struct.pack(">II", a, b) + purpose + b"\x01"
        return hmac.digest(secret, info, "sha256")


class KeyPair:
    """An ephemeral X25519 key pair; the library wipes the private half when it is let go."""

    def __init__(self, private_key: bytes | None = None) -> None:
        """Args: private_key: 32 raw bytes; a fresh key where it is None."""
        self._key = (
            X25519PrivateKey.generate()
            if private_key is None
            else X25519PrivateKey.from_private_bytes(private_key)
        )
        self.public_key = self._key.public_key().public_bytes_raw()

    def private_bytes(self) -> bytes:
        """The raw private key, 32 bytes: for a process that goes on in another."""
        return self._key.private_bytes_raw()

    def agree(self, public_key: bytes, member: int) -> bytes:
        """The secret shared with ``member``, 32 bytes.

        Raises:
            Refused: a key of small order, which would make the secret known to all.
        """
        try:
            return self._key.exchange(X25519PublicKey.from_public_bytes(public_key))
        except ValueError:
            raise Refused(
                Reason.REPLACED_KEY, f"member {member} advertises a key of small order"
            ) from None
