"""What makes a strategy asynchronous: it steps when a few clients have answered, however stale."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias

Staleness: TypeAlias = Literal["constant", "polynomial", "hinge"]

Speed: TypeAlias = Literal["equal", "lognormal", "exponential", "real"]


class Asynchronous(NamedTuple):
    """When the server steps, and what a stale update counts for.

    Args:
        concurrency: clients in training at any time; ``None``: the cohort.
        buffer: answers to a step.
        discount: staleness (server steps since the client was given its model) -> factor, 1 for 0.
        towards: whether a client pulls the model towards its own, in place of adding its delta.
        speed: how long clients take: all alike; each at a speed of its own, lognormal; each time
            anew, exponential; or ``real``, as replies come.
        spread: of the lognormal, the standard deviation of the logarithm.
    """

    concurrency: int | None
    buffer: int
    discount: Callable[[int], float]
    towards: bool
    speed: Speed
    spread: float


def discount(kind: Staleness, a: float, b: int) -> Callable[[int], float]:
    """A client's weight by its staleness t.

    ``polynomial``: (1 + t)^-a. ``hinge``: 1 up to b, then 1 / (a (t - b) + 1).

    Source: Xie, Koyejo and Gupta 2019, section 5.2 (arXiv:1903.03934).
    """
    if kind == "constant":
        return lambda t: 1.0
    if kind == "polynomial":
        return lambda t: float((1 + t) ** -a)
    return lambda t: 1.0 if t <= b else 1 / (a * (t - b) + 1)
