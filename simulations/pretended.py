"""Clients that only a trial has: everybody's first round, on a model's own parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from umbel.client import own
from umbel.client.training import ClientRuntime
from umbel.core.trees import Model, Tree, map_tree
from umbel.simulations.kernels.around import Around
from umbel.strategies.parts import Local, Trees
from umbel.tasks.build import model_of

STEPS = 2


def one(runtime: ClientRuntime, module: nn.Module, shared: Trees) -> Local:
    """What the parts read of a client that trains ``module``; its parameters are the module's.

    Args:
        runtime: whose rule counts.
        module: in any precision, which the client's other tensors take.
        shared: what the strategy broadcasts besides the model.
    """
    params = {name: p for name, p in module.named_parameters() if p.requires_grad}
    model = model_of(module)
    copied = Model(map_tree(torch.clone, model.params), map_tree(torch.clone, model.buffers))
    precision = next(iter(params.values())).dtype

    def cast(tree: Tree) -> dict[str, Tensor]:
        return map_tree(lambda t: t.to(precision) if t.is_floating_point() else t, tree)

    first = {**own.first(runtime.rule, copied), **own.told(runtime.rule, "")}
    mine = {letter: cast(tree) for letter, tree in first.items()}
    broadcast = {letter: cast(tree) for letter, tree in shared.items()}
    rule = runtime.rule
    if mine.keys() >= set(rule.joint):  # else where training starts says what is trained along
        rule = rule._replace(begin=None)
    started = own.start(rule, copied.params, broadcast, mine)
    along = {n: t.clone().requires_grad_() for n, t in started.items() if n not in params}
    return Local({**params, **along}, copied.params, broadcast, mine, 0, STEPS)


def two(local: Local) -> tuple[dict[str, Tensor], Around]:
    """Two such clients: the stacks that they train, and what else is read."""

    def twice(tree: Tree) -> dict[str, Tensor]:
        return map_tree(lambda t: torch.stack([t.detach(), t.detach()]), tree)

    private = frozenset(local.own.get(own.PRIVATE, {})) & local.anchor.keys()
    pair = twice(local.anchor)
    device = next(iter(local.params.values())).device
    around = Around(
        {name: pair[name] if name in private else a for name, a in local.anchor.items()},
        private,
        local.shared,
        {letter: twice(tree) for letter, tree in local.own.items()},
        steps=torch.tensor([float(STEPS)] * 2, device=device),
    )
    return twice(local.params), around
