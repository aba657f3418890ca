"""Ed25519 keys of a deployment: on disk, and what they sign.

A signature for one purpose can never be read as one for another.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from umbel.core.errors import InputError

PROTOCOL = b"umbel deployment 1"


def make_key(path: Path) -> Ed25519PrivateKey:
    """A fresh key from the operating system's generator, kept at ``path``: PKCS #8 PEM, 0600.

    Raises:
        FileExistsError: a file is there already.
    """
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    write_new(path, pem, 0o600)
    return key


def read_key(path: Path) -> Ed25519PrivateKey:
    """The key that :func:`make_key` wrote.

    Raises:
        InputError: there is none, or it is of another kind.
    """
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"cannot read the key: {error}", where=str(path), fix="restore it from a backup"
        ) from None
    if not isinstance(key, Ed25519PrivateKey):
        raise InputError("not an Ed25519 key", where=str(path), fix="restore it from a backup")
    return key


def public_bytes(key: Ed25519PrivateKey) -> bytes:
    """The raw public key, 32 bytes."""
    return key.public_key().public_bytes_raw()


def sign(key: Ed25519PrivateKey, purpose: str, message: bytes) -> str:
    """Signs ``message`` for ``purpose``; base64."""
    return base64.b64encode(key.sign(_statement(purpose, message))).decode("ascii")


def verify(public_key: bytes, purpose: str, message: bytes, signature: str) -> bool:
    """Whether the owner of ``public_key`` signed ``message`` for ``purpose``."""
    try:
        key = Ed25519PublicKey.from_public_bytes(public_key)
        key.verify(base64.b64decode(signature, validate=True), _statement(purpose, message))
    except (InvalidSignature, ValueError, TypeError, binascii.Error):
        return False
    return True


def fingerprint(content: bytes) -> str:
    """What two people compare on the telephone: SHA-256 in groups of four hexadecimal digits."""
    digest = hashlib.sha256(content).hexdigest()
    return ":".join(digest[i : i + 4] for i in range(0, len(digest), 4))


def same_fingerprint(one: str, other: str) -> bool:
    """Whether two fingerprints are one, however they were typed."""
    return _digits(one) == _digits(other) != ""


def write_new(path: Path, content: bytes, mode: int) -> None:
    """Writes a file that was not there, readable as ``mode`` says from its first byte.

    Raises:
        FileExistsError: a file is there already.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)


def replace_file(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Writes a file in one step: whoever reads sees the old one or the new one, whole."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.unlink(missing_ok=True)
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def _digits(text: str) -> str:
    return "".join(c for c in text.lower().removeprefix("sha256:") if c in "0123456789abcdef")


def _statement(purpose: str, message: bytes) -> bytes:
    return PROTOCOL + b"\0" + purpose.encode() + b"\0" + message
