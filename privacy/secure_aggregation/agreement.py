"""Keys for a pair of members, for one round: ephemeral X25519, then HKDF-SHA256.

Every derived key is bound to the round's terms (salt) and to run, round, ordered pair and purpose
(info), so that no key serves two ends.

Source: RFC 7748 (X25519), RFC 5869 (HKDF).
"""

from __future__ import annotations

import struct
from enum import Enum

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from umbel.privacy.secure_aggregation.identities import PROTOCOL
from umbel.privacy.secure_aggregation.refusals import Reason, Refused


class Purpose(Enum):
    """What a derived key is for."""

    PAIRWISE_MASK = b"pairwise mask"
    SELF_MASK = b"self mask"
    SHARE_BOX = b"share box"
    CONFIRMATION = b"confirmation"


def hkdf(secret: bytes, salt: bytes, info: bytes, size: int = 32) -> bytes:
    """HKDF-SHA256, extract and expand; ``size`` bytes."""
    return HKDF(hashes.SHA256(), size, salt, info).derive(secret)


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

    def derive(self, secret: bytes, source: int, destination: int, purpose: Purpose) -> bytes:
        """The 32-byte key of the ordered pair (source, destination) for ``purpose``."""
        info = self._prefix + struct.pack(">II", source, destination) + purpose.value
        return hkdf(secret, self._salt, info)

    def mask(self, secret: bytes, a: int, b: int) -> bytes:
        """The key of the mask between ``a`` and ``b``; the same from both sides."""
        return self.derive(secret, min(a, b), max(a, b), Purpose.PAIRWISE_MASK)


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
        """The raw private key, 32 bytes, to be shared out among the neighbours."""
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
