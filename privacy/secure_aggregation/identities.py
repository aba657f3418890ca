"""Who is who: long-lived Ed25519 identities, and the pinned list of everybody's public keys.

The list comes from provisioning, not from the aggregation server. A member's number is its place
in the list; the list's digest is part of what every key is bound to, so that two members with
different lists cannot take part in one round.

An identity signs, and it agrees on a lasting secret with every other: its Ed25519 key is an X25519
key under the birational map of RFC 7748, section 4.1. That secret goes into every key of a pair, so
that only the two identities can have it, whatever ephemeral keys a server hands them.

Source: Thormarker 2021, "On using the same key pair for Ed25519 and an X25519 based KEM" (ePrint
2021/509): the two uses do not endanger each other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from umbel.core.errors import InputError

PROTOCOL = b"umbel secure aggregation 2"
KEY_BYTES = 32
_FIELD = 2**255 - 19
SIGNATURE_BYTES = 64


def _statement(purpose: bytes, message: bytes) -> bytes:
    # A signature for one purpose can never be read as one for another.
    return PROTOCOL + b"\0" + purpose + b"\0" + message


class Identity:
    """A member's signing key."""

    def __init__(self, private_key: bytes) -> None:
        """Args: private_key: raw Ed25519 private key, 32 bytes."""
        self._key = Ed25519PrivateKey.from_private_bytes(private_key)
        self.public_key = self._key.public_key().public_bytes_raw()
        # What Ed25519 makes of its seed (RFC 8032, section 5.1.5); X25519 clamps it alike.
        scalar = hashlib.sha512(private_key).digest()[:32]
        self._agreement = X25519PrivateKey.from_private_bytes(scalar)
        self._secrets: dict[bytes, bytes] = {}

    @classmethod
    def generate(cls) -> Identity:
        """A fresh identity from the operating system's generator."""
        return cls(Ed25519PrivateKey.generate().private_bytes_raw())

    def sign(self, purpose: bytes, message: bytes) -> bytes:
        """Signs ``message`` for ``purpose``; 64 bytes."""
        return self._key.sign(_statement(purpose, message))

    def agree(self, directory: Directory, member: int) -> bytes:
        """The lasting secret with ``member``, 32 bytes; computed once.

        Raises:
            ValueError: its pinned key is of small order.
        """
        pinned = directory[member]
        secret = self._secrets.get(pinned)
        if secret is None:
            secret = self._secrets[pinned] = self._agreement.exchange(
                directory.exchange_key(member)
            )
        return secret


def simulated(seed: int, name: str) -> Identity:
    """For simulations alone: whoever knows the seed knows the key."""
    return Identity(hashlib.sha256(f"umbel simulated identity\0{seed}\0{name}".encode()).digest())


class Directory:
    """The pinned public keys of all members; a member's number is its place in the list.

    Args:
        public_keys: raw Ed25519 public keys, 32 bytes each, all different.
    Raises:
        InputError: a key of another length, or one key twice (one party with two numbers).
    """

    def __init__(self, public_keys: Sequence[bytes]) -> None:
        for number, key in enumerate(public_keys):
            if len(key) != KEY_BYTES:
                raise InputError(
                    f"public key {number} has {len(key)} bytes, expected {KEY_BYTES}",
                    where="secure aggregation directory",
                    fix="pin the raw Ed25519 public key of each member",
                )
        if len(set(public_keys)) != len(public_keys):
            raise InputError(
                "one public key stands twice in the directory",
                where="secure aggregation directory",
                fix="give each member its own identity; two numbers for one party break the bounds",
            )
        self._keys = tuple(public_keys)
        self._parsed: dict[int, Ed25519PublicKey] = {}
        self._exchange: list[X25519PublicKey] = []
        self.digest = hashlib.sha256(_statement(b"directory", b"".join(self._keys))).digest()

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, member: int) -> bytes:
        return self._keys[member]

    def exchange_key(self, member: int) -> X25519PublicKey:
        """The pinned key of ``member`` for agreements; all are converted at the first call."""
        if not self._exchange:
            ys = [int.from_bytes(key, "little") & ((1 << 255) - 1) for key in self._keys]
            # u = (1 + y) / (1 - y); the neutral element, y = 1, maps to 0, which agrees on nothing.
            inverses = _invert_all([(1 - y) % _FIELD or 1 for y in ys])
            self._exchange = [
                X25519PublicKey.from_public_bytes(
                    ((1 + y) % _FIELD * inverse % _FIELD * (y % _FIELD != 1)).to_bytes(32, "little")
                )
                for y, inverse in zip(ys, inverses, strict=True)
            ]
        return self._exchange[member]

    def verify(self, member: int, purpose: bytes, message: bytes, signature: bytes) -> bool:
        """Whether ``member`` signed ``message`` for ``purpose``; false for an unknown member."""
        if not 0 <= member < len(self._keys):
            return False
        try:
            key = self._parsed.get(member)
            if key is None:
                key = Ed25519PublicKey.from_public_bytes(self._keys[member])
                self._parsed[member] = key
            key.verify(signature, _statement(purpose, message))
        except (InvalidSignature, ValueError):
            return False
        return True


def _invert_all(values: list[int]) -> list[int]:
    """The inverses in the field of the curve with one inversion (Montgomery's trick)."""
    before = [1]
    for value in values:
        before.append(before[-1] * value % _FIELD)
    rest = pow(before[-1], -1, _FIELD)
    inverses = [0] * len(values)
    for i in range(len(values) - 1, -1, -1):
        inverses[i] = rest * before[i] % _FIELD
        rest = rest * values[i] % _FIELD
    return inverses
