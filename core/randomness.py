"""Every draw is a function of (seed, purpose, round, client): there is no global generator.

A draw is a hash of its coordinates, so a whole cohort is drawn in one vectorised call, in any
order, on any machine, with the same result. These numbers shuffle, sample and initialise: they are
*not* noise that protects anybody (see privacy/).

Source: the mixer is the finaliser of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable
pseudorandom number generators", OOPSLA), in counter mode.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_M1 = np.uint64(0xBF58476D1CE4E5B9)
_M2 = np.uint64(0x94D049BB133111EB)
_LAST = np.uint64(0xFFFFFFFFFFFFFFFF)

BLOCK = 1 << 16
"""Numbers hashed at a time where there are many: as many as stay in a core's cache."""


def mix(key: U64 | np.uint64, counter: U64 | np.uint64 | int) -> U64:
    """Hashes ``counter`` under ``key``, both broadcast together; 64 well-mixed bits each."""
    with np.errstate(over="ignore"):
        z = np.asarray(key, np.uint64) + (np.asarray(counter, np.uint64) + np.uint64(1)) * _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * _M1
        z = (z ^ (z >> np.uint64(27))) * _M2
        return np.asarray(z ^ (z >> np.uint64(31)))


def key(seed: int, purpose: str, *coordinates: int | str) -> np.uint64:
    """The key of one stream of draws; distinct coordinates give independent streams."""
    text = "\x1f".join([str(seed), purpose, *map(str, coordinates)])
    return np.uint64(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big"))


def client_keys(seed: int, purpose: str, round_number: int, clients: Sequence[str]) -> U64:
    """One key a client, shape (clients,); each is ``key(seed, purpose, round_number, client)``."""
    # What the texts of all keys begin with is hashed once: this runs for each client of a round.
    begun = hashlib.blake2b(f"{seed}\x1f{purpose}\x1f{round_number}\x1f".encode(), digest_size=8)
    digests = []
    for client in clients:
        stream = begun.copy()
        stream.update(client.encode())
        digests.append(stream.digest())
    return np.frombuffer(b"".join(digests), dtype=">u8").astype(np.uint64)


def permutation(stream: np.uint64, n: int) -> npt.NDArray[np.int64]:
    """A uniform permutation of 0 … n-1, shape (n,): the order of n hashes."""
    if n > BLOCK:
        return _in_place(stream, n, (n - 1).bit_length())
    return np.argsort(mix(stream, np.arange(n, dtype=np.uint64)), kind="stable")


def _in_place(stream: np.uint64, n: int, bits: int) -> npt.NDArray[np.int64]:
    """:func:`permutation` in 8 n bytes and half the time, for millions; n ≤ 2**bits.

    Each number takes the place of its hash's last bits, which decide only where all others agree.
    """
    mask = np.uint64((1 << bits) - 1)
    order = np.empty(n, np.uint64)
    for begin in range(0, n, BLOCK):
        numbers = np.arange(begin, min(begin + BLOCK, n), dtype=np.uint64)
        order[begin : begin + BLOCK] = (mix(stream, numbers) & ~mask) | numbers
    order.sort()
    tied = np.concatenate(
        [
            begin + np.flatnonzero((part[1:] ^ part[:-1]) <= mask)
            for begin in range(0, n, BLOCK)
            for part in (order[begin : begin + BLOCK + 1],)
        ]
    )
    order &= mask
    if len(tied):
        places = np.union1d(tied, tied + 1)
        # Runs of ties stand in the order of their first bits, and so do the hashes of all of them.
        order[places] = order[places][np.argsort(mix(stream, order[places]))]
    return order.view(np.int64)


def permutations(streams: U64, sizes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """A permutation a row, shape (rows, max(sizes)); row i is that of 0 … sizes[i]-1, then padding.

    The padding of row i is sizes[i], sizes[i]+1, …; the first sizes[i] entries are exactly
    ``permutation(streams[i], sizes[i])``.
    """
    width = int(sizes.max(initial=0))
    counters = np.arange(width, dtype=np.uint64)
    hashes = mix(streams[:, None], counters[None, :])
    if sizes.min(initial=width) < width:
        hashes[np.arange(width)[None, :] >= sizes[:, None]] = _LAST
    return np.argsort(hashes, axis=1, kind="stable")


def torch_seed(seed: int, purpose: str, *coordinates: int | str) -> int:
    """A seed for ``torch.manual_seed``, from the same coordinates; 0 … 2**63-1."""
    return int(key(seed, purpose, *coordinates) >> np.uint64(1))


def generator(seed: int, purpose: str, *coordinates: int | str) -> np.random.Generator:
    """A numpy generator (Philox) for draws that a hash does not give, such as gamma variates."""
    return np.random.Generator(np.random.Philox(key=int(key(seed, purpose, *coordinates))))
