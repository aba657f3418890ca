"""GradNorm: parts of a task learn at the same pace."""

from __future__ import annotations

import torch
from torch import Tensor

from umbel.core.settings import NonNegative, Positive
from umbel.core.trees import Tree
from umbel.strategies.fedavg import fedavg
from umbel.strategies.parts import ClientRule, Local, Strategy, Trees
from umbel.strategies.parts.multi import dot, heads, part_gradients
from umbel.strategies.parts.rule import Forward, joined, mean, model_part


def gradnorm(
    *,
    pace: NonNegative = 1.5,
    initial_losses: list[Positive] | None = None,
    server_lr: Positive = 1.0,
) -> Strategy:
    """FedAvg whose clients weigh the parts of their task. Chen et al. 2018, Algorithm 1
    (arXiv:1711.02257).

    Each client keeps its weights from round to round; its optimizer trains them along, and they are
    scaled to add up to the number of parts after each step. The norms are over all parameters that
    parts share, where the paper has the last shared layer. For tasks with several parts, such as
    ``multi-task``.

    Args:
        pace: alpha: how strongly a part that learns slowly is pulled.
        initial_losses: L(0) of each part, such as log of its classes (section 3.2); ``None``: 1.
        server_lr: as in FedAvg.
    """

    def state(params: Tree) -> Trees:
        some = next(iter(params.values()))
        return {"w": {"parts": some.new_ones(heads(params))}}

    def objective(forward: Forward, local: Local, batch: Tree, mask: Tensor | None) -> Tensor:
        params, w = model_part(local.params), joined(local.params, "w")["parts"]
        losses, found = part_gradients(forward, params, batch, mask)
        shared = [{n: g for n, g in f.items() if not n.startswith("heads.")} for f in found]
        norms = torch.stack([dot(f, f).sqrt() for f in shared])
        first = (
            torch.ones_like(losses) if initial_losses is None else losses.new_tensor(initial_losses)
        )
        ratios = losses / first
        rates = (ratios / ratios.mean().clamp(min=1e-20)) ** pace
        target = ((w * norms).mean() * rates).detach()
        own = torch.stack([mean(each, mask) for each in forward.parts(params, batch).unbind(1)])
        return (w.detach() * own).sum() + (w * norms - target).abs().sum()

    def after(params: Tree, gradient: Tree, local: Local) -> Tree:
        w = params["w/parts"].clamp(min=1e-3)
        return {**params, "w/parts": w * (len(w) / w.sum())}

    rule = ClientRule(state=state, objective=objective, joint=("w",), after=after)
    return fedavg(server_lr=server_lr)._replace(client=rule)
