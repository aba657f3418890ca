"""MOON: what a client's model makes of an example stays near to what the global one makes of it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from umbel.core.settings import NonNegative, Positive
from umbel.core.trees import Tree
from umbel.strategies.fedavg import fedavg
from umbel.strategies.parts import ClientRule, Delivered, Ended, Local, Strategy
from umbel.strategies.parts.rule import Forward, mean


def moon(
    *, mu: NonNegative = 1.0, temperature: Positive = 0.5, server_lr: Positive = 1.0
) -> Strategy:
    """MOON. Li, He and Song 2021, equations 3 and 4 (arXiv:2103.16257); mu = 0 is FedAvg.

    ``l = l_sup - mu log(exp(s(z, z_glob) / T) / (exp(s(z, z_glob) / T) + exp(s(z, z_prev) / T)))``,
    where s is the cosine, and z what the last layer is given under the client's parameters, the
    global ones and those that the client ended its last round with (at first the global ones).

    Args:
        mu: weight of the contrastive term.
        temperature: T.
        server_lr: as in FedAvg.
    """

    def objective(forward: Forward, local: Local, batch: Tree, mask: Tensor | None) -> Tensor:
        z = forward.features(local.params, batch).flatten(1)
        with torch.no_grad():
            far = [
                forward.features(params, batch).flatten(1)
                for params in (local.anchor, local.own["previous"])
            ]
        towards, away = (cosine_similarity(z, other) / temperature for other in far)
        contrast = torch.nn.functional.softplus(away - towards)
        return mean(forward.losses(local.params, batch) + mu * contrast, mask)

    def end(ended: Ended) -> Delivered:
        return Delivered(own={"previous": ended.params})

    rule = ClientRule(state=lambda params: {"previous": params}, end=end, objective=objective)
    return fedavg(server_lr=server_lr)._replace(client=rule)
