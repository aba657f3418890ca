"""FedAdagrad: the mean delta is the gradient of an Adagrad step at the server."""

from __future__ import annotations

from umbel.core.settings import Fraction, Positive
from umbel.strategies.parts import Strategy
from umbel.strategies.parts.adaptive import adaptive


def fedadagrad(
    *, server_lr: Positive = 0.1, beta1: Fraction = 0.0, tau: Positive = 1e-3
) -> Strategy:
    """FedAdagrad. Reddi et al. 2021, Algorithm 2, ``v + Delta^2`` (arXiv:2003.00295).

    Args:
        server_lr: eta.
        beta1: of the first moment; the paper's FedAdagrad has none.
        tau: degree of adaptivity, in units of the delta.
    """
    return adaptive(lambda v, squares: v + squares, server_lr=server_lr, beta1=beta1, tau=tau)
