"""Who is who: long-lived Ed25519 identities, and the pinned list of everybody's public keys.

The list comes from provisioning, not from the aggregation server. A member's number is its place
in the list; the list's digest is part of what everybody signs, so that two members with different
lists cannot take part in one round.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from umbel.core.errors import InputError

PROTOCOL = b"umbel secure aggregation 1"
KEY_BYTES = 32
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

    @classmethod
    def generate(cls) -> Identity:
        """A fresh identity from the operating system's generator."""
        return cls(Ed25519PrivateKey.generate().private_bytes_raw())

    def sign(self, purpose: bytes, message: bytes) -> bytes:
        """Signs ``message`` for ``purpose``; 64 bytes."""
        return self._key.sign(_statement(purpose, message))


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
        self.digest = hashlib.sha256(_statement(b"directory", b"".join(self._keys))).digest()

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, member: int) -> bytes:
        return self._keys[member]

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
