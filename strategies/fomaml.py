"""First-order MAML: without second derivatives."""

from __future__ import annotations

from umbel.core.settings import Count, NonNegative, Positive, Share
from umbel.strategies.fedavg import fedavg
from umbel.strategies.parts import ClientRule, Strategy
from umbel.strategies.parts.meta import after_adapting


def fomaml(
    *,
    inner_lr: NonNegative = 0.01,
    inner_steps: Count = 1,
    support: Share = 0.5,
    server_lr: Positive = 1.0,
) -> Strategy:
    """First-order MAML. Finn et al. 2017, section 5.2 (arXiv:1703.03400).

    The gradient of the query loss at the adapted parameters is applied to the ones before.

    Args:
        inner_lr: alpha, of the steps on the support part.
        inner_steps: how many.
        support: share of each batch that is adapted to; 1 uses the whole batch for both.
        server_lr: as in FedAvg.
    """
    objective = after_adapting(inner_lr, inner_steps, support, first=True)
    return fedavg(server_lr=server_lr)._replace(client=ClientRule(objective=objective))
