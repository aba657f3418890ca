"""Shamir's secret sharing of raw 32-byte secrets over the smallest prime above 2**256.

Any ``threshold`` shares give the secret, fewer give nothing at all. Holder i of k has the value of
the polynomial at i, 1 ≤ i ≤ k. Points are small numbers, so evaluation is cheap.

Source: Shamir 1979, "How to share a secret".
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from functools import lru_cache
from operator import mul

import numpy as np

PRIME = 2**256 + 297
SECRET_BYTES = 32
SHARE_BYTES = 33
_RANDOM_BYTES = 56


class InconsistentSharesError(ValueError):
    """The shares do not lie on a polynomial whose value at zero is a 32-byte secret."""


def split(secret: bytes, threshold: int, holders: int) -> list[bytes]:
    """Shares ``secret`` among ``holders``; share i belongs to point i + 1.

    Args:
        secret: 32 bytes.
        threshold: shares that give the secret, 1 ≤ threshold ≤ holders.
        holders: number of shares, 33 bytes each.
    Raises:
        ValueError: the numbers are out of bounds.
    """
    if len(secret) != SECRET_BYTES or not 1 <= threshold <= holders:
        raise ValueError(f"cannot share {len(secret)} bytes {threshold} of {holders}")
    coefficients = [int.from_bytes(secret, "big")]
    # 192 bits more than the prime has: reduced, they are uniform to within 2**-190.
    random = os.urandom(_RANDOM_BYTES * (threshold - 1))
    for at in range(0, len(random), _RANDOM_BYTES):
        coefficients.append(int.from_bytes(random[at : at + _RANDOM_BYTES], "big") % PRIME)
    # The powers of small points are small, so one reduction a share will do.
    return [
        (sum(map(mul, coefficients, powers)) % PRIME).to_bytes(SHARE_BYTES, "big")
        for powers in _powers(threshold, holders)
    ]


@lru_cache(maxsize=64)
def _powers(threshold: int, holders: int) -> tuple[tuple[int, ...], ...]:
    """x**0 … x**(threshold - 1) for the points 1 … holders."""
    return tuple(tuple(x**i for i in range(threshold)) for x in range(1, holders + 1))


def combine(shares: Mapping[int, bytes]) -> bytes:
    """The secret, from exactly as many shares as the threshold, keyed by their points.

    Raises:
        InconsistentSharesError: the value at zero is no 32-byte secret. Wrong shares mostly give
            a wrong secret instead: compare the result with a commitment.
    """
    points = tuple(sorted(shares))
    total = 0
    for weight, x in zip(_at_zero(points), points, strict=True):
        total += weight * int.from_bytes(shares[x], "big")
    total %= PRIME
    if total >> (8 * SECRET_BYTES):
        raise InconsistentSharesError("the shares do not belong to one secret")
    return total.to_bytes(SECRET_BYTES, "big")


@lru_cache(maxsize=4096)
def _at_zero(points: tuple[int, ...]) -> tuple[int, ...]:
    """Lagrange's coefficients at zero, λ_i = Π_{j≠i} x_j / (x_j − x_i); public numbers."""
    xs = np.array(points, dtype=np.int64)
    factors = xs[None, :] - xs[:, None]
    np.fill_diagonal(factors, xs)  # the product of row i is then x_i · Π_{j≠i} (x_j − x_i)
    # As many factors as fit 63 bits are multiplied by numpy, the few that are left by Python.
    group = max(1, 62 // max(points[-1].bit_length(), 1))
    padded = np.ones((len(points), -(-len(points) // group) * group), dtype=np.int64)
    padded[:, : len(points)] = factors
    grouped = padded.reshape(len(points), -1, group).prod(axis=2).tolist()
    inverses = _invert_all([math.prod(row) % PRIME for row in grouped])
    top = math.prod(points) % PRIME
    return tuple(top * inverse % PRIME for inverse in inverses)


def _invert_all(values: list[int]) -> list[int]:
    """The inverses modulo the prime with one inversion (Montgomery's trick)."""
    before = [1]
    for value in values:
        before.append(before[-1] * value % PRIME)
    rest = pow(before[-1], -1, PRIME)
    inverses = [0] * len(values)
    for i in range(len(values) - 1, -1, -1):
        inverses[i] = rest * before[i] % PRIME
        rest = rest * values[i] % PRIME
    return inverses
