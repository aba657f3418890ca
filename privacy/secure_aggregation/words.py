"""Vectors on the wire: as few whole bytes a number as the ring needs."""

from __future__ import annotations

import numpy as np

from umbel.privacy.secure_aggregation.keystream import Words
from umbel.privacy.secure_aggregation.refusals import Reason, Refused
from umbel.privacy.secure_aggregation.terms import Terms


def pack_words(words: Words, terms: Terms) -> memoryview:
    """Words modulo 2**ring_bits, little-endian, ``word_bytes`` each; changes ``words``."""
    if terms.ring_bits < 32:
        words &= np.uint32((1 << terms.ring_bits) - 1)
    if terms.word_bytes == 4:
        return words.view(np.uint8).data
    narrow = words.view(np.uint8).reshape(-1, 4)[:, : terms.word_bytes]
    return memoryview(narrow.tobytes())


def unpack_words(data: bytes | memoryview, terms: Terms) -> Words:
    """The words of ``pack_words``.

    Raises:
        Refused: another length, or a word outside the ring.
    """
    if len(data) != terms.size * terms.word_bytes:
        raise Refused(Reason.MALFORMED, f"{len(data)} bytes for {terms.size} elements")
    if terms.word_bytes == 4:
        words = np.frombuffer(data, dtype="<u4")
    else:
        wide = np.zeros((terms.size, 4), dtype=np.uint8)
        narrow = np.frombuffer(data, dtype=np.uint8).reshape(-1, terms.word_bytes)
        wide[:, : terms.word_bytes] = narrow
        words = wide.reshape(-1).view("<u4")
    if terms.ring_bits % 8 and int(words.max()) >> terms.ring_bits:
        raise Refused(Reason.MALFORMED, f"an element lies outside {terms.ring_bits} bits")
    return words
