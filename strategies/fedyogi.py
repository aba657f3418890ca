"""FedYogi: the mean delta is the gradient of a Yogi step at the server."""

from __future__ import annotations

from umbel.core.settings import Fraction, Positive
from umbel.strategies.parts import Strategy
from umbel.strategies.parts.adaptive import adaptive


def fedyogi(
    *,
    server_lr: Positive = 0.01,
    beta1: Fraction = 0.9,
    beta2: Fraction = 0.99,
    tau: Positive = 1e-3,
) -> Strategy:
    """FedYogi. Reddi et al. 2021, Algorithm 2 (arXiv:2003.00295).

    ``v = v - (1 - beta2) Delta^2 sign(v - Delta^2)``: unlike Adam's, ``v`` moves by a step whose
    size does not depend on how far it has to go.

    Args:
        server_lr: eta.
        beta1: of the first moment.
        beta2: of the second moment.
        tau: degree of adaptivity, in units of the delta.
    """
    return adaptive(
        lambda v, squares: v - (1 - beta2) * squares * (v - squares).sign(),
        server_lr=server_lr,
        beta1=beta1,
        tau=tau,
    )
