"""FedAsync: every client that is back pulls the model towards its own."""

from __future__ import annotations

from umbel.core.settings import Count, Natural, NonNegative, Positive, Share
from umbel.strategies.fedavg import fedavg
from umbel.strategies.parts import ClientRule, Strategy
from umbel.strategies.parts.asynchronous import Asynchronous, Speed, Staleness, discount
from umbel.strategies.parts.rule import proximal


def fedasync(
    *,
    alpha: Share = 0.6,
    mu: NonNegative = 0.0,
    concurrency: Count | None = None,
    staleness: Staleness = "polynomial",
    a: Positive = 0.5,
    b: Natural = 4,
    speed: Speed = "lognormal",
    spread: NonNegative = 1.0,
) -> Strategy:
    """FedAsync. Xie, Koyejo and Gupta 2019, Algorithm 1 (arXiv:1903.03934).

    ``x = (1 - alpha s(t)) x + alpha s(t) x_client``; a round is one client.

    Args:
        alpha: mixing weight of a fresh model.
        mu: rho, weight of the proximal term around the model that the client was given.
        concurrency: clients in training at any time; ``None``: the cohort.
        staleness: s of a model t steps old: 1, (1 + t)^-a, or a hinge.
        a: exponent of ``polynomial``; slope of ``hinge``.
        b: steps before ``hinge`` falls.
        speed: in simulation, how long clients take: all alike; each its own, lognormal; or anew
            each time, exponential. ``real``: as replies come.
        spread: of ``lognormal``, the standard deviation of the logarithm.
    """
    by_age = discount(staleness, a, b)
    rule = Asynchronous(
        concurrency, 1, lambda t: alpha * by_age(t), towards=True, speed=speed, spread=spread
    )
    client = ClientRule(loss_terms=(proximal(mu),)) if mu else ClientRule()
    return fedavg()._replace(client=client, asynchronous=rule)
