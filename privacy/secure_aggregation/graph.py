"""Who is whose neighbour: a Harary graph on a permutation that nobody could choose.

The server is hostile and some clients help it, so neither may pick the graph. Each client commits
to a secret before the roster is fixed and opens it afterwards; the permutation is a hash of all of
them. One honest opening makes it uniform, so each client, opening its own, knows its neighbours to
be a random subset of the roster. The last to open could still withhold and so choose between two
graphs: therefore *all* of the roster must open, or the graph is drawn again among those who did.
The commitment is the end of a hash chain, opened one link a draw; MAX_DRAWS bounds the draws, and
the union bound in ``parameters`` counts them. The complete graph needs no draw.

Source: Bell et al. 2020, section 3 (k-regular graph on a random permutation); Harary 1962.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from umbel.privacy.secure_aggregation.identities import PROTOCOL
from umbel.privacy.secure_aggregation.keystream import key_bytes
from umbel.privacy.secure_aggregation.parameters import MAX_DRAWS

NONCE_BYTES = 32
_LINK = PROTOCOL + b"\0chain\0"

Order = npt.NDArray[np.int64]


def _link(value: bytes) -> bytes:
    return hashlib.sha256(_LINK + value).digest()


class Chain:
    """A client's own secrets for the draws of one round, and the commitment to them.

    Args:
        links, commitment: of a chain that there was before; a fresh one where they are left out.
    """

    def __init__(self, links: list[bytes] | None = None, commitment: bytes = b"") -> None:
        if links is None:
            links = [os.urandom(NONCE_BYTES)]
            for _ in range(MAX_DRAWS):
                links.append(_link(links[-1]))
            commitment = links.pop()
        self.commitment = commitment
        self.links = links

    def open(self, draw: int) -> bytes:
        """The secret of draw 0 … MAX_DRAWS - 1; it shows nothing about those of later draws."""
        return self.links[MAX_DRAWS - 1 - draw]


def opens(commitment: bytes, draw: int, nonce: bytes) -> bool:
    """Whether ``nonce`` is what ``commitment`` promised for ``draw``."""
    for _ in range(draw + 1):
        nonce = hashlib.sha256(_LINK + nonce).digest()
    return nonce == commitment


def all_open(commitments: Sequence[bytes], draw: int, nonces: bytes) -> int:
    """The first place whose secret is not the promised one, or -1; ``nonces`` in the same order."""
    sha256, size = hashlib.sha256, NONCE_BYTES
    for place, commitment in enumerate(commitments):
        nonce = nonces[size * place : size * (place + 1)]
        for _ in range(draw + 1):
            nonce = sha256(_LINK + nonce).digest()
        if nonce != commitment:
            return place
    return -1


def seed_of(roster_digest: bytes, nonces: bytes) -> bytes:
    """The seed of the graph, 32 bytes, from the secrets of all members in roster order."""
    return hashlib.sha256(PROTOCOL + b"\0graph seed\0" + roster_digest + nonces).digest()


def digest_of(roster_digest: bytes, seed: bytes) -> bytes:
    """What all later messages are bound to: terms, roster, degree, threshold and graph."""
    return hashlib.sha256(PROTOCOL + b"\0graph\0" + roster_digest + seed).digest()


def roster_digest_of(
    terms_digest: bytes, draw: int, neighbours: int, threshold: int, adverts: bytes
) -> bytes:
    """The digest of a roster and of the graph's parameters, before the graph is drawn."""
    head = struct.pack(">BHH", draw, neighbours, threshold)
    return hashlib.sha256(PROTOCOL + b"\0roster\0" + terms_digest + head + adverts).digest()


def kept_digest(terms_digest: bytes, setup_digest: bytes) -> bytes:
    """The same for a round that keeps the roster and the graph of an earlier one."""
    return hashlib.sha256(PROTOCOL + b"\0kept\0" + terms_digest + setup_digest).digest()


def ring(seed: bytes, n: int) -> Order:
    """A permutation of 0 … n-1 from ``seed``: the order of n pseudorandom 64-bit numbers."""
    return np.argsort(np.frombuffer(key_bytes(seed, 8 * n), dtype="<u8"), kind="stable")


def neighbours_on(order: Order, k: int) -> list[tuple[int, ...]]:
    """The neighbours of each position, ascending; position i's are ``result[i]``.

    Args:
        order: shape (n,), the ring: ``order[p]`` is the position that sits at place p.
        k: the degree; n·k even. k = n − 1 is the complete graph.
    """
    n = len(order)
    offsets = [j for half in range(1, k // 2 + 1) for j in (half, -half)]
    if k % 2:
        offsets.append(n // 2)  # n is even, the opposite place is the same from both sides
    places = (np.arange(n)[:, None] + np.array(offsets, dtype=np.int64)[None, :]) % n
    table = np.empty((n, k), dtype=np.int64)
    table[order] = np.sort(order[places], axis=1)
    return [tuple(row) for row in table.tolist()]


def neighbours_of(order: Order, k: int, position: int) -> tuple[int, ...]:
    """The neighbours of one position, ascending."""
    n = len(order)
    place = int(np.flatnonzero(order == position)[0])
    offsets = [j for half in range(1, k // 2 + 1) for j in (half, -half)]
    if k % 2:
        offsets.append(n // 2)
    return tuple(sorted(order[(place + np.array(offsets, dtype=np.int64)) % n].tolist()))
