"""FlexLoRA: the mean product, cut back to the adapter's rank."""

from __future__ import annotations

import torch

from umbel.core.trees import Tree
from umbel.strategies.fedavg import fedavg
from umbel.strategies.parts import Combined, ServerState, Strategy
from umbel.strategies.parts.low_rank import as_params, error, mean_product, pairs, with_products
from umbel.strategies.parts.ranks import Ranks, check_ranks, with_ranks


def flexlora(*, ranks: Ranks | None = None) -> Strategy:
    """FlexLoRA. Bai et al. 2024, section 3.2 (arXiv:2402.11505).

    A and B are the best factors of the adapter's rank for the mean of the clients' ``B A``, by a
    singular value decomposition whose values are divided evenly between them. A client of a smaller
    rank has the first of them.

    Args:
        ranks: of the clients' adapters, where not all have the model's: a list, of which each
            client has one by its name, or a table of names.
    """
    plain = fedavg()

    def init(params: Tree) -> ServerState:
        check_ranks(ranks, params)
        return plain.init(params)

    def server(params: Tree, state: ServerState, mean: Combined) -> tuple[Tree, ServerState]:
        stepped = dict(plain.server(params, state, mean)[0])
        for pair in pairs(params):
            u, s, v = torch.linalg.svd(mean_product(params, mean, pair), full_matrices=False)
            rank = min(len(params[pair.a]), len(s))
            root = s[:rank].sqrt()
            a, b = torch.zeros_like(params[pair.a]), torch.zeros_like(params[pair.b])
            a[:rank], b[:, :rank] = root[:, None] * v[:rank], u[:, :rank] * root
            stepped |= as_params({pair.a: a, pair.b: b}, params)
        return stepped, state

    return plain._replace(
        init=init,
        client=with_ranks(plain.client, ranks),
        combine=with_products(),
        server=server,
        figures=error,
    )
