"""FLoRA: the clients' adapters are stacked, merged into the model, and begun anew."""

from __future__ import annotations

import torch

from umbel.core import randomness
from umbel.core.trees import Model, Tree, zeros_like
from umbel.strategies.fedavg import fedavg
from umbel.strategies.parts import Combined, ServerState, Strategy
from umbel.strategies.parts.low_rank import (
    error,
    mean_product,
    moved,
    pairs,
    uniform,
    with_products,
)
from umbel.strategies.parts.ranks import Ranks, check_ranks, with_ranks


def flora(*, ranks: Ranks | None = None) -> Strategy:
    """FLoRA. Wang et al. 2024, equation 8 and Algorithm 1 (arXiv:2409.05976).

    Stacked factors are a sum of products: the residual of each layer takes the exact mean of the
    clients' ``B A``, after which B is 0 and A is drawn anew, a function of the round. It needs
    ``adapter = { kind = "lora", residual = true }``, and a layer's residual is as large on the wire
    as the layer.

    Args:
        ranks: of the clients' adapters, where not all have the model's: a list, of which each
            client has one by its name, or a table of names.
    """
    plain = fedavg()

    def init(params: Tree) -> ServerState:
        check_ranks(ranks, params)
        return {"done": torch.zeros(())}

    def server(params: Tree, state: ServerState, mean: Combined) -> tuple[Tree, ServerState]:
        stepped = dict(plain.server(params, {}, mean)[0])
        done = state["done"] + 1
        for pair in pairs(params):
            seed = randomness.torch_seed(0, "flora", int(done), pair.layer)
            stepped[pair.a] = uniform(params[pair.a], torch.Generator().manual_seed(seed))
            stepped |= zeros_like({pair.b: params[pair.b]})
        return stepped, {"done": done}

    def buffers(model: Model, combined: Combined) -> Tree:
        steps = {p.residual: mean_product(model.params, combined, p) for p in pairs(model.params)}
        return moved(model, steps, "flora")

    return plain._replace(
        init=init,
        client=with_ranks(plain.client, ranks),
        combine=with_products(),
        server=server,
        buffers=buffers,
        figures=error,
    )
