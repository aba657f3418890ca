"""Where random bits come from: the operating system, or, in simulation alone, the run's seed.

Both are AES-256 in counter mode, so that what is drawn from them is drawn by the same code. The
system's stream takes a fresh 256-bit key from the operating system for *every* draw: it has no
state that a fork, a copied virtual machine or a core dump could repeat or give away.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

U64: TypeAlias = npt.NDArray[np.uint64]
Generator: TypeAlias = Literal["os", "seeded"]

# 2^27 words are 2^26 blocks a key: the distance of AES-CTR from random is below 2^-76 there.
_WORDS_PER_KEY = 1 << 27


class Stream(NamedTuple):
    """A source of independent uniform 64-bit words.

    Args:
        generator: ``os`` protects people; ``seeded`` repeats, protects nobody, and has to stand in
            every record of a run that used it.
        words: n -> (n,) uint64.
    """

    generator: Generator
    words: Callable[[int], U64]


def system_stream() -> Stream:
    """Words that nobody can repeat, keyed by ``os.urandom``; safe over forks and threads."""

    def words(n: int) -> U64:
        parts = range(0, n, _WORDS_PER_KEY)
        found = [_aes(os.urandom(32), 0, min(_WORDS_PER_KEY, n - at)) for at in parts]
        return found[0] if len(found) == 1 else np.concatenate([*found, np.empty(0, np.uint64)])

    return Stream("os", words)


def seeded_stream(seed: int, purpose: str, *coordinates: int | str) -> Stream:
    """For simulation alone: words that are a function of (seed, purpose, coordinates).

    Draws from one stream follow each other; streams of other coordinates are independent.
    """
    text = "\x1f".join(["umbel noise", str(seed), purpose, *map(str, coordinates)])
    return Stream("seeded", _words(hashlib.blake2b(text.encode(), digest_size=32).digest()))


def keyed_stream(secret: bytes, generator: Generator, *coordinates: int | str) -> Stream:
    """Words that whoever holds ``secret`` can draw again, and nobody else can tell from random.

    For noise that a later round has to take back (:mod:`umbel.privacy.correlated_noise`). The
    secret is as sensitive as the data: it is kept where the ledger is, and never sent.

    Args:
        secret: 32 bytes, of ``os.urandom`` outside simulations.
        generator: where the secret comes from.
        coordinates: streams of distinct ones are independent; each begins at its first word.
    """
    text = "\x1f".join(["umbel correlated noise", *map(str, coordinates)])
    key = hashlib.blake2b(text.encode(), digest_size=32, key=secret).digest()
    return Stream(generator, _words(key))


def _words(key: bytes) -> Callable[[int], U64]:
    """Draws follow each other."""
    used = 0

    def words(n: int) -> U64:
        nonlocal used
        found = _aes(key, used, n)
        used += (n + 1) // 2
        return found

    return words


def _aes(key: bytes, block: int, n: int) -> U64:
    """``n`` words of the key stream from counter ``block`` on; a block is two words."""
    counter = block.to_bytes(16, "big")
    encryptor = Cipher(algorithms.AES(key), modes.CTR(counter)).encryptor()
    out = np.zeros(n, dtype="<u8")
    # In and out are the same memory: the key stream is added to zeros.
    octets = out.view(np.uint8).data
    encryptor.update_into(octets, octets)
    return out.astype(np.uint64, copy=False)
