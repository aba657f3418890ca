"""Exact binomial tails, and the confidence intervals that they give."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

F64: TypeAlias = npt.NDArray[np.float64]


@lru_cache(maxsize=32)
def _log_choose(n: int) -> F64:
    factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    return np.asarray(factorials[n] - factorials - factorials[::-1])


def masses(n: int, p: float) -> F64:
    """P(X = 0 … n) for X ~ Binomial(n, p), shape (n + 1,)."""
    k = np.arange(n + 1)
    if p in (0.0, 1.0):
        return np.asarray(k == n * p, dtype=np.float64)
    found: F64 = np.exp(_log_choose(n) + k * math.log(p) + (n - k) * math.log1p(-p))
    return found


def at_least(k: int, n: int, p: float) -> float:
    """P(X >= k) for X ~ Binomial(n, p)."""
    if k <= 0:
        return 1.0
    return min(1.0, float(masses(n, p)[k:].sum())) if k <= n else 0.0


def clopper_pearson(k: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """An interval that holds the probability behind ``k`` successes of ``n``, this often or more.

    Either end alone is a bound with confidence (1 + ``confidence``) / 2.

    Source: Clopper and Pearson 1934 (doi:10.1093/biomet/26.4.404).
    """
    tail = (1 - confidence) / 2
    low = 0.0 if k == 0 else _root(lambda p: at_least(k, n, p) - tail)[0]
    high = 1.0 if k == n else _root(lambda p: at_least(k + 1, n, p) - (1 - tail))[1]
    return low, high


def _root(rising: Callable[[float], float]) -> tuple[float, float]:
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) <= 0 else (low, middle)
    return low, high
