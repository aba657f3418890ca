"""The pseudorandom generator: AES-256 in counter mode, read as 32-bit words.

The counter runs from 2, as in GCM with a zero nonce: OpenSSL encrypts GCM in wider steps than plain
CTR, and with its tag unread the two give the same bytes.

A mask of d words costs one pass of the cipher and one addition, both inside the cache: streams are
advanced together, one chunk of the vector after the other, and no mask is ever held whole.

Source: NIST SP 800-38A (CTR) and 800-38D (GCM); a key serves one stream, hence the zero nonce.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes

Words = npt.NDArray[np.uint32]

_CHUNK = 1 << 18  # bytes: vector, key stream and zeros stay in a second-level cache of 1 MiB
_TOGETHER = 256  # streams that are open at one time
_ZEROS = bytes(_CHUNK)
_MODE = modes.GCM(bytes(12))


def _stream(key: bytes) -> CipherContext:
    return Cipher(algorithms.AES256(key), _MODE).encryptor()


class KeyStream:
    """The key stream of one 32-byte key, from its first byte on."""

    def __init__(self, key: bytes) -> None:
        self._cipher = _stream(key)

    def into(self, buffer: bytearray, size: int) -> None:
        """Writes the next ``size`` bytes, at most one chunk, to the start of ``buffer``."""
        self._cipher.update_into(memoryview(_ZEROS)[:size], buffer)


def scratch() -> tuple[bytearray, Words]:
    """A chunk to write key stream into, and the same memory as words, shape (65536,)."""
    buffer = bytearray(_CHUNK)
    return buffer, np.frombuffer(buffer, dtype="<u4")


def key_bytes(key: bytes, size: int) -> bytes:
    """The first ``size`` bytes of the key stream of ``key``."""
    return _stream(key).update(bytes(size))


def fresh_stream() -> KeyStream:
    """A stream under a key from the operating system, known to nobody and kept nowhere."""
    return KeyStream(os.urandom(32))


def add_streams(target: Words, plus: Sequence[bytes], minus: Sequence[bytes]) -> None:
    """Adds the streams of ``plus`` to ``target`` and takes those of ``minus`` off, in place.

    Args:
        target: shape (d,), little-endian 32-bit words, contiguous; arithmetic is modulo 2**32, and
            so exact modulo any smaller power of two.
        plus: 32-byte keys.
        minus: 32-byte keys.
    """
    signed = [(key, np.add) for key in plus] + [(key, np.subtract) for key in minus]
    buffer, words = scratch()
    step = _CHUNK // 4
    for first in range(0, len(signed), _TOGETHER):
        streams = [(KeyStream(key), apply) for key, apply in signed[first : first + _TOGETHER]]
        for start in range(0, target.size, step):
            chunk = target[start : start + step]
            mask = words[: chunk.size]
            for stream, apply in streams:
                stream.into(buffer, 4 * chunk.size)
                apply(chunk, mask, out=chunk)
    words[:] = 0
