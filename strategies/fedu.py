"""FedU: a client takes the global predictor only where the encoders have not gone apart."""

from __future__ import annotations

from fnmatch import fnmatchcase

import torch

from umbel.core.settings import Positive
from umbel.core.trees import Tree, norm, subtract
from umbel.strategies.fedavg import fedavg
from umbel.strategies.parts import ClientRule, Delivered, Ended, Strategy, Trees


def fedu(
    *, predictor: str = "predictor.*", threshold: Positive = 0.4, server_lr: Positive = 1.0
) -> Strategy:
    """FedU. Zhuang et al. 2021, section 3.4 and equation 4 (arXiv:2108.06492).

    The online network is averaged; a client whose encoder ended its last round further than
    ``threshold`` from the new global one goes on with its own predictor. For ``byol`` and
    ``simsiam``.

    Args:
        predictor: pattern of the predictor's tensor names.
        threshold: mu, on the L2 norm of the difference of all other parameters.
        server_lr: as in FedAvg.
    """

    def others(tree: Tree) -> Tree:
        return {n: t for n, t in tree.items() if not fnmatchcase(n, predictor)}

    def begin(anchor: Tree, shared: Trees, own: Trees) -> Tree:
        near = norm(subtract(others(anchor), others(own["last"]))) < threshold
        mine = {n: t for n, t in own["last"].items() if fnmatchcase(n, predictor)}
        return {n: torch.where(near, g, mine[n]) if n in mine else g for n, g in anchor.items()}

    def end(ended: Ended) -> Delivered:
        return Delivered(own={"last": ended.params})

    rule = ClientRule(state=lambda params: {"last": params}, begin=begin, end=end)
    return fedavg(server_lr=server_lr)._replace(client=rule)
