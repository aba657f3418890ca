"""MAML: a model that is good after a few steps on a client's own examples."""

from __future__ import annotations

from umbel.core.settings import Count, NonNegative, Positive, Share
from umbel.strategies.fedavg import fedavg
from umbel.strategies.parts import ClientRule, Strategy
from umbel.strategies.parts.meta import after_adapting


def maml(
    *,
    inner_lr: NonNegative = 0.01,
    inner_steps: Count = 1,
    support: Share = 0.5,
    server_lr: Positive = 1.0,
) -> Strategy:
    """MAML with exact second derivatives. Finn et al. 2017, Algorithm 1 (arXiv:1703.03400).

    Federated as FedMeta (Chen et al. 2018, Algorithm 1, arXiv:1802.07876), whose meta-step of rate
    beta is ``[client] optimizer = "sgd"``, ``lr = beta``, ``local_steps = 1``; more local steps and
    other optimizers are possible. ``inner_lr = 0`` minimises the query loss as FedAvg does.

    Args:
        inner_lr: alpha, of the steps on the support part.
        inner_steps: how many.
        support: share of each batch that is adapted to; the rest is the query part. 1 uses the
            whole batch for both.
        server_lr: as in FedAvg.
    """
    objective = after_adapting(inner_lr, inner_steps, support, first=False)
    return fedavg(server_lr=server_lr)._replace(client=ClientRule(objective=objective))
