"""FedAdam: the mean delta is the gradient of an Adam step at the server."""

from __future__ import annotations

from umbel.core.settings import Fraction, Positive
from umbel.strategies.parts import Strategy
from umbel.strategies.parts.adaptive import adaptive


def fedadam(
    *,
    server_lr: Positive = 0.01,
    beta1: Fraction = 0.9,
    beta2: Fraction = 0.99,
    tau: Positive = 1e-3,
) -> Strategy:
    """FedAdam. Reddi et al. 2021, Algorithm 2 (arXiv:2003.00295).

    ``v = beta2 v + (1 - beta2) Delta^2``.

    Args:
        server_lr: eta.
        beta1: of the first moment.
        beta2: of the second moment.
        tau: degree of adaptivity, in units of the delta.
    """
    return adaptive(
        lambda v, squares: beta2 * v + (1 - beta2) * squares,
        server_lr=server_lr,
        beta1=beta1,
        tau=tau,
    )
