"""FedBuff: the server steps on the mean of a buffer of deltas, stale ones counting for less."""

from __future__ import annotations

from umbel.core.settings import Count, Natural, NonNegative, Positive
from umbel.strategies.fedavg import fedavg
from umbel.strategies.parts import Strategy
from umbel.strategies.parts.asynchronous import Asynchronous, Speed, Staleness, discount


def fedbuff(
    *,
    buffer: Count = 10,
    concurrency: Count | None = None,
    staleness: Staleness = "polynomial",
    a: Positive = 0.5,
    b: Natural = 10,
    speed: Speed = "lognormal",
    spread: NonNegative = 1.0,
    server_lr: Positive = 1.0,
) -> Strategy:
    """FedBuff. Nguyen et al. 2022, Algorithm 1 (arXiv:2106.06639).

    A round is a server step. With buffer = cohort and equal speeds it is FedAvg.

    Args:
        buffer: K, answers to a server step; a failure is one, too.
        concurrency: clients in training at any time; ``None``: the cohort.
        staleness: weight of a delta t steps old: 1, (1 + t)^-a, or the hinge of FedAsync.
        a: exponent of ``polynomial``, 1/2 in the paper; slope of ``hinge``.
        b: steps before ``hinge`` falls.
        speed: in simulation, how long clients take: all alike; each its own, lognormal; or anew
            each time, exponential. ``real``: as replies come.
        spread: of ``lognormal``, the standard deviation of the logarithm.
        server_lr: eta_g.
    """
    rule = Asynchronous(
        concurrency, buffer, discount(staleness, a, b), towards=False, speed=speed, spread=spread
    )
    return fedavg(server_lr=server_lr)._replace(asynchronous=rule)
