"""From what was released to (epsilon, delta): always an upper bound, over unequal releases.

Two accountants of ``dp_accounting`` interpret the same events. *RDP* composes by adding vectors,
which are kept per unique mechanism, so that a debit costs microseconds: it watches budgets online.
*PLD* is tighter and takes a second or so: it calibrates, reports, and has the last word before a
refusal. Both are bounds, so the smaller one is the answer.

A history is a mapping from mechanism to how often it ran: composition does not depend on the order.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Literal, NamedTuple, TypeAlias

import dp_accounting
import numpy as np
import numpy.typing as npt
from dp_accounting import pld, rdp

from umbel.core.errors import InputError
from umbel.privacy.mechanisms import Mechanism, SkellamSum

F64: TypeAlias = npt.NDArray[np.float64]
History: TypeAlias = Mapping[Mechanism, int]
Accountant: TypeAlias = Literal["rdp", "pld"]

ORDERS: tuple[float, ...] = (
    *(1 + tenths / 10 for tenths in range(1, 100)),
    *map(float, range(11, 64)),
    128.0,
    256.0,
    512.0,
    1024.0,
)
"""Renyi orders, those of ``dp_accounting``."""

INTEGER_ORDERS: tuple[float, ...] = (*map(float, range(2, 129)), 256.0, 512.0, 1024.0)
"""The coarser grid of the papers on distributed noise, to compare with their numbers."""

# Every float64 rounding on the way is far below this, per release.
_SLACK = 1e-13

# What PLD's Fourier transforms lose of the tail: against the exact Gaussian they understate delta
# by up to 4e-13 over 20,000 releases (tests/privacy/test_accounting.py): taken off, with room.
_LOST = 1e-12
_LOST_PER_RELEASE = 1e-15

# Cells of the privacy loss distribution: finer than this buys nothing, more of them is minutes.
_INTERVAL = 1e-4
_COARSE = 1e-3

# What a cell's width adds grows with its square and with the releases: less than 1e-5 of epsilon,
# and of a small epsilon no larger a part.
_DRIFT = 5e-5
_CELLS = 5e5


class Epsilon(NamedTuple):
    """A guarantee, and which accountant found it."""

    epsilon: float
    delta: float
    accountant: Accountant


def compose(*parts: tuple[Mechanism, int] | History) -> Counter[Mechanism]:
    """One history of all ``parts``: histories, or (mechanism, times).

    Raises:
        InputError: a mechanism ran a negative number of times.
    """
    total: Counter[Mechanism] = Counter()
    for part in parts:
        pairs: Iterable[tuple[Mechanism, int]] = (
            part.items() if isinstance(part, Mapping) else [part]
        )
        for mechanism, times in pairs:
            if times < 0:
                raise InputError(
                    f"{times} steps", where="accounting", fix="give a number of at least 0"
                )
            if times:
                total[mechanism] += times
    return total


@lru_cache(maxsize=65536)
def rdp_vector(mechanism: Mechanism, orders: tuple[float, ...] = ORDERS) -> F64:
    """The Renyi divergences of one release, shape (orders,), read-only; ``inf`` where unknown.

    Source: Mironov, Talwar and Zhang 2019, section 3 (arXiv:1908.10530), in ``dp_accounting``.
    """
    if isinstance(mechanism, SkellamSum):
        bound = np.array([mechanism.divergence(alpha) for alpha in orders]) + _SLACK
        bound.setflags(write=False)
        return bound
    accountant = rdp.RdpAccountant(orders)
    try:
        with _quiet():
            accountant.compose(mechanism.event())
    except ArithmeticError:  # next to no noise: nothing is proven
        return np.full(len(orders), np.inf)
    found: F64 = accountant.rdp
    # A divergence is never negative: what is, is rounding, and must not count in our favour.
    vector = np.where(np.isnan(found), np.inf, np.maximum(found, 0.0))
    if not isinstance(mechanism.event(), dp_accounting.NoOpDpEvent):
        vector = vector + _SLACK
    vector.setflags(write=False)
    return vector


def rdp_total(history: History, orders: tuple[float, ...] = ORDERS) -> F64:
    """The Renyi divergences of a whole history, shape (orders,)."""
    total = np.zeros(len(orders))
    for mechanism, times in history.items():
        if times:
            total += times * rdp_vector(mechanism, orders)
    return total


def to_epsilon(total: F64, delta: float, orders: tuple[float, ...] = ORDERS) -> F64:
    """The least epsilon that Renyi divergences prove, for many histories at once.

    Args:
        total: (…, orders).
        delta: in (0, 1).

    Returns:
        (…,), at least 0; ``inf`` where nothing is proven.

    Source: Canonne, Kamath and Steinke 2020, Proposition 12 (arXiv:2004.00010); below a divergence
    of -log(1 - delta^2), epsilon is 0 by the Bretagnolle-Huber inequality, as in ``dp_accounting``.
    """
    check_delta(delta)
    alpha = np.asarray(orders)
    # Near order 1 the bound is useless, and unstable.
    usable = alpha > 1.01
    gain = np.log1p(-1 / alpha) - np.log(delta * alpha) / (alpha - 1)
    epsilon = np.where(usable, total + gain, np.inf)
    epsilon = np.where(delta**2 + np.expm1(-total) > 0, 0.0, epsilon)
    return np.asarray(np.maximum(epsilon.min(axis=-1), 0.0))


def rdp_epsilon(history: History, delta: float, orders: tuple[float, ...] = ORDERS) -> float:
    """Epsilon by Renyi divergences."""
    return float(to_epsilon(rdp_total(history, orders), delta, orders))


def pld_epsilon(history: History, delta: float, *, coarse: bool = False) -> float:
    """Epsilon by privacy loss distributions; ``inf`` where they prove nothing.

    That is so for concentrated and Skellam mechanisms, of which no distribution is known, and for
    a delta below what float64 Fourier transforms resolve.

    Args:
        history: what ran.
        delta: in (0, 1).
        coarse: a bound that is a little looser, several times as fast: to search with.

    Source: Doroshenko et al. 2022, connect-the-dots (arXiv:2207.04380), in ``dp_accounting``.
    """
    check_delta(delta)
    return _pld_epsilon(frozenset((m, t) for m, t in history.items() if t), delta, coarse)


@lru_cache(maxsize=4096)
def _pld_epsilon(history: frozenset[tuple[Mechanism, int]], delta: float, coarse: bool) -> float:
    bound = rdp_epsilon(dict(history), delta)
    releases = sum(times for _, times in history)
    reachable = delta - _LOST - _LOST_PER_RELEASE * releases
    if not bound or reachable <= 0:
        return 0.0 if not bound else math.inf
    alone, sampled = _merge(history)
    if not sampled:
        return _gaussian_epsilon(alone, delta)
    scale = bound if math.isfinite(bound) else 1000.0
    fine = min(max(_INTERVAL, min(scale, 1.0) * (_DRIFT / releases) ** 0.5), _COARSE)
    interval = _COARSE if coarse else fine
    accountant = pld.PLDAccountant(value_discretization_interval=max(interval, scale / _CELLS))
    if alone:
        accountant.compose(dp_accounting.GaussianDpEvent(alone**-0.5))
    # A fixed order: the same history gives the same bits, however it came about.
    for event, times in sorted(sampled.items(), key=repr):
        if not accountant.supports(event):
            return math.inf
        try:
            accountant.compose(event, times)
        except ArithmeticError:  # next to no noise
            return math.inf
    return float(accountant.get_epsilon(reachable))


def _merge(
    history: frozenset[tuple[Mechanism, int]],
) -> tuple[float, Counter[dp_accounting.DpEvent]]:
    """Gaussians over everybody as one, by its 1 / std^2; and how often each other event ran."""
    precisions: list[float] = []
    others: Counter[dp_accounting.DpEvent] = Counter()
    for mechanism, times in history:
        event = mechanism.event()
        if isinstance(event, dp_accounting.GaussianDpEvent):
            precisions.append(times / event.noise_multiplier**2)
        elif not isinstance(event, dp_accounting.NoOpDpEvent):
            others[event] += times
    return math.fsum(precisions), others


def _gaussian_epsilon(precision: float, delta: float) -> float:
    """The exact epsilon of one Gaussian release, rounded up in the ninth digit.

    Source: Balle and Wang 2018, Theorem 8 (arXiv:1805.06530), in ``dp_accounting``.
    """
    if not precision:
        return 0.0
    exact = dp_accounting.get_epsilon_gaussian(precision**-0.5, delta, tol=1e-10)
    return float(exact) * (1 + 1e-9) + 1e-10


def epsilon(history: History, delta: float, accountant: Accountant = "pld") -> Epsilon:
    """The least proven epsilon: of RDP alone, or of RDP and PLD.

    Raises:
        InputError: ``delta`` is not in (0, 1).
    """
    online = rdp_epsilon(history, delta)
    if accountant == "rdp":
        return Epsilon(online, delta, "rdp")
    tight = pld_epsilon(history, delta)
    return Epsilon(tight, delta, "pld") if tight <= online else Epsilon(online, delta, "rdp")


def check_delta(delta: float) -> None:
    """Raises an InputError unless 0 < ``delta`` < 1."""
    if not 0 < delta < 1:
        raise InputError(
            f"delta = {delta} is not between 0 and 1",
            where="privacy",
            fix="use much less than one over the number of units, such as 1e-5",
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Orders whose series does not converge are left out; ``dp_accounting`` warns of each."""
    logger = logging.getLogger("absl")
    logger.addFilter(_nothing)
    try:
        yield
    finally:
        logger.removeFilter(_nothing)


def _nothing(record: logging.LogRecord) -> bool:
    return False
