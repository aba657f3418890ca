"""An estimate of epsilon from one run, by how far canaries in random directions moved the model.

Not a bound: it says which epsilon the canaries' alignment looks like, as if both were Gaussian.

Source: Andrew, Kairouz, Oh, Oprea, McMahan and Suriyakumar 2023, "One-shot Empirical Privacy
Estimation for Federated Learning", Algorithms 1 to 3 (arXiv:2302.03098).
"""

from __future__ import annotations

import math
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from umbel.core.errors import InputError

F64: TypeAlias = npt.NDArray[np.float64]

MOST = 1000.0


class Normal(NamedTuple):
    """A normal distribution, by mean and standard deviation."""

    mean: float
    std: float

    def below(self, x: float) -> float:
        """P(X <= x)."""
        return 0.5 * math.erfc((self.mean - x) / (self.std * math.sqrt(2)))


class Estimate(NamedTuple):
    """What the canaries look like.

    Args:
        epsilon: the empirical epsilon; no bound.
        delta: that it is for.
        present: how aligned the model is with canaries that took part.
        absent: the same for canaries that did not.
    """

    epsilon: float
    delta: float
    present: Normal
    absent: Normal


def estimate(
    present: F64, absent: F64 | None, dimension: int, delta: float, pooled: bool = False
) -> Estimate:
    """From cosines to an empirical epsilon.

    Args:
        present: cosines of the model's change with the canaries that took part.
        absent: the same for fresh canaries; ``None``: N(0, 1 / dimension), which a random direction
            has with anything (Algorithm 2). Where each canary's score is the largest cosine over
            the rounds (Algorithm 3), they have to be given.
        dimension: d, of the canaries.
        delta: of the guarantee.
        pooled: whether both have the same standard deviation, that of the mechanism's noise, as
            where canaries do not touch each other. One number from all canaries is steadier than
            two, of which the tails make a lot.

    Raises:
        InputError: fewer than two canaries.
    """
    if len(present) < 2 or (absent is not None and len(absent) < 2):
        raise InputError("fewer than two canaries", where="one-shot estimate", fix="give more")
    without = Normal(0.0, dimension**-0.5) if absent is None else _fit(absent)
    inside = _fit(present)
    if pooled:
        n, m = len(present), 0 if absent is None else len(absent)
        std = math.sqrt((n * inside.std**2 + m * without.std**2) / (n + m))
        inside, without = Normal(inside.mean, std), Normal(without.mean, std)
    both = (hockey_stick(inside, without, delta), hockey_stick(without, inside, delta))
    return Estimate(max(both), delta, inside, without)


def hockey_stick(left: Normal, right: Normal, delta: float) -> float:
    """The least epsilon >= 0 with P(S) <= e^epsilon Q(S) + delta for all sets S; up to 1000.

    P is ``left`` and Q is ``right``: where their log ratio, a parabola, is above epsilon.
    """
    low, high = 0.0, MOST
    if not (left.std and right.std):  # no noise at all
        return 0.0 if left == right else MOST
    if _excess(left, right, 0.0) <= delta:
        return 0.0
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _excess(left, right, middle) > delta else (low, middle)
    return high


def _excess(left: Normal, right: Normal, epsilon: float) -> float:
    # log p - log q - epsilon = a x^2 + b x + c
    a = 0.5 * (right.std**-2 - left.std**-2)
    b = left.mean / left.std**2 - right.mean / right.std**2
    c = 0.5 * ((right.mean / right.std) ** 2 - (left.mean / left.std) ** 2)
    c += math.log(right.std / left.std) - epsilon
    if abs(a) * left.std**2 < 1e-12:
        if abs(b) * left.std < 1e-12:
            return 1 - math.exp(epsilon) if c > 0 else 0.0
        return (
            _above(left, right, epsilon, -c / b) if b > 0 else _below(left, right, epsilon, -c / b)
        )
    root = b * b - 4 * a * c
    if root <= 0:
        return 1 - math.exp(epsilon) if a > 0 else 0.0
    ends = sorted(((-b - math.sqrt(root)) / (2 * a), (-b + math.sqrt(root)) / (2 * a)))
    outer = _below(left, right, epsilon, ends[0]) + _above(left, right, epsilon, ends[1])
    if a > 0:
        return outer
    inside = [n.below(ends[1]) - n.below(ends[0]) for n in (left, right)]
    return inside[0] - _scaled(epsilon, inside[1])


def _below(left: Normal, right: Normal, epsilon: float, x: float) -> float:
    return left.below(x) - _scaled(epsilon, right.below(x))


def _above(left: Normal, right: Normal, epsilon: float, x: float) -> float:
    mirrored = [Normal(-n.mean, n.std).below(-x) for n in (left, right)]
    return mirrored[0] - _scaled(epsilon, mirrored[1])


def _scaled(epsilon: float, mass: float) -> float:
    """e^epsilon times a probability, where the first may be beyond float64."""
    return math.exp(min(epsilon + math.log(mass), 700.0)) if mass > 0 else 0.0


def _fit(values: F64) -> Normal:
    mean, std = float(values.mean()), float(values.std())
    return Normal(mean, std if std > 1e-9 * abs(mean) else 0.0)
