"""How much noise a target epsilon needs, and how many rounds a budget lasts."""

from __future__ import annotations

import math
from collections.abc import Callable

from umbel.core.errors import InputError
from umbel.privacy.accounting import Accountant, History, check_delta, compose, epsilon, pld_epsilon
from umbel.privacy.mechanisms import EVERYONE, Gaussian, Mechanism, Relation, Sampling

# No more noise than this is looked for: the model would be noise alone.
MOST_NOISE = 1e4
LEAST_NOISE = 1e-3

# The multiplier found is at most this factor above the least one.
_TOLERANCE = 1e-5
_SEARCH = 1e-3

# Stands for log(epsilon / target) where epsilon is 0 or infinite.
_FAR = 5.0


def noise_multiplier(
    target: float,
    delta: float,
    steps: int,
    sampling: Sampling = EVERYONE,
    relation: Relation = "add-or-remove-one",
    spent: History | None = None,
    accountant: Accountant = "pld",
    mechanism: Callable[[float], Mechanism] | None = None,
) -> float:
    """The least noise multiplier with which ``steps`` releases cost at most ``target``.

    Guarantees: the epsilon that :func:`umbel.privacy.accounting.epsilon` finds for the result is
    never above ``target``; the result is within 1e-5 of the least multiplier, relatively. Under
    0.001, the multiplier 0.001 is the answer.

    Args:
        target: epsilon, > 0, over ``spent`` and the planned steps together.
        delta: in (0, 1).
        steps: releases planned, > 0.
        sampling: how units come to take part in each.
        relation: the neighbouring relation.
        spent: what was released before, if the budget also covers that.
        mechanism: makes another release of a multiplier; ``None``: a Gaussian one.
        accountant: ``rdp`` is faster by a hundred times, and asks for about 5% more noise.

    Raises:
        InputError: the target cannot be reached with any noise up to 10,000, or is none.
    """
    if not (target > 0 and math.isfinite(target)):
        raise _wrong(f"epsilon = {target} is not a positive number", "give a target such as 3.0")
    if steps < 1:
        raise _wrong(f"{steps} steps are planned", "plan at least one")
    check_delta(delta)
    before = spent or {}
    release = mechanism or (lambda z: Gaussian(z, sampling, relation))

    def cost(z: float, accountant: Accountant) -> float:
        planned = (release(z), steps)
        return epsilon(compose(before, planned), delta, accountant).epsilon

    already = epsilon(before, delta, accountant).epsilon
    if already > target:
        raise _wrong(
            f"epsilon {already:.4g} of {target:g} was spent before",
            "raise the budget, or use other data",
        )
    start = MOST_NOISE
    if cost(start, "rdp") <= target:
        start = _least(lambda z: cost(z, "rdp"), target, 1.0)
    if accountant == "rdp" and start < MOST_NOISE:
        return start
    if cost(start, accountant) > target:
        raise _wrong(
            f"epsilon {target:g} over {steps} steps needs a noise multiplier above {MOST_NOISE:g}",
            "plan fewer steps, sample less, or raise epsilon",
        )
    # PLD asks for a little less than RDP, which is a hundred times faster; and coarse PLD for next
    # to nothing more than PLD.
    near = 0.8

    def coarse(z: float) -> float:
        planned = (release(z), steps)
        return pld_epsilon(compose(before, planned), delta, coarse=True)

    if start < MOST_NOISE and coarse(start) <= target:
        start, near = _least(coarse, target, start, 0.85, _SEARCH), 1 - 2 * _SEARCH
    return _least(lambda z: cost(z, accountant), target, start, near)


def _least(
    cost: Callable[[float], float],
    target: float,
    start: float,
    near: float = 0.8,
    tolerance: float = _TOLERANCE,
) -> float:
    """The least z with ``cost(z) <= target``, for a decreasing cost, by false position in logs.

    Source: the Illinois rule, Dowell and Jarratt 1971, BIT 11.
    """
    high = start
    while (gap_high := _gap(cost(high), target)) > 0:
        high *= 2
    low = (high if high > start else start) * near
    while (gap_low := _gap(cost(low), target)) <= 0:
        if low <= LEAST_NOISE:
            return LEAST_NOISE
        high, gap_high = low, gap_low
        low = max(low / 2, LEAST_NOISE)
    last = 0
    while high / low > 1 + tolerance:
        width = math.log(high / low)
        # Not nearer to an end than the tolerance: both ends have to close in.
        step = gap_low / (gap_low - gap_high) * width
        step = min(max(step, tolerance / 3), width - tolerance / 3)
        middle = low * math.exp(step)
        gap = _gap(cost(middle), target)
        if gap <= 0:
            high, gap_high, side = middle, gap, 1
            gap_low /= 2 if last == side else 1
        else:
            low, gap_low, side = middle, gap, -1
            gap_high /= 2 if last == side else 1
        last = side
    return high


def _gap(found: float, target: float) -> float:
    if found == 0:
        return -_FAR
    return _FAR if math.isinf(found) else math.log(found / target)


def releases(mechanism: Mechanism, target: float, delta: float, most: int = 1_000_000_000) -> int:
    """How many releases of ``mechanism`` cost at most ``target``; 0 … ``most``.

    Raises:
        InputError: ``delta`` is not in (0, 1).
    """

    def fits(times: int, accountant: Accountant) -> bool:
        return epsilon({mechanism: times}, delta, accountant).epsilon <= target

    # RDP first: it is fast, and PLD then allows a tenth or so on top.
    low = _last(lambda times: fits(times, "rdp"), 0, most, 1.0)
    return _last(lambda times: fits(times, "pld"), low, most, 0.1)


def _last(fits: Callable[[int], bool], low: int, most: int, stride: float) -> int:
    """The last number up to ``most`` that fits, from ``low``, which does."""
    high = low
    while high < most:
        high = min(low + max(1, math.ceil(stride * low)), most)
        if not fits(high):
            break
        low = high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _wrong(message: str, fix: str) -> InputError:
    return InputError(message, where="[privacy]", fix=fix)
