"""The own parts of many clients' rounds at once: :mod:`umbel.client.own` over stacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from umbel.client import own
from umbel.client.training import ClientRuntime
from umbel.core.trees import Model, Tree, flatten, map_tree, to_device, unflatten
from umbel.simulations.kernels.around import Around
from umbel.strategies.parts import ClientRule, Trees


def needed(rule: ClientRule, shared: Tree) -> bool:
    """Whether any part of the rule reads more than the global parameters."""
    parts = rule.loss_terms or rule.grad_transforms or rule.objective or rule.after
    return bool(parts) or not rule.plain or bool(shared)


def opened(
    runtime: ClientRuntime,
    model: Model,
    shared: Tree,
    clients: Sequence[str],
    kept: Sequence[Tree | None],
    steps: Tensor,
) -> Around:
    """What the clients of a chunk begin a round with.

    Args:
        runtime: whose rule and device count.
        model: the global model, with the initial tensors in the place of private ones.
        shared: what the strategy broadcasts besides, ``letter/name`` -> (*shape).
        clients: C names.
        kept: what each kept, ``letter/name`` -> tensor; ``None``: nothing yet.
        steps: (C,), how many each will take.

    Raises:
        RunError: what a client kept does not fit the model.
    """
    rule, device = runtime.rule, runtime.device
    whole = Model(to_device(model.params, device), to_device(model.buffers, device))
    mine = _stacks(own.first(rule, whole), clients, kept, device) if rule.keeps else {}
    told = [own.told(rule, client) for client in clients]
    for letter, tree in told[0].items():
        mine[letter] = {n: torch.stack([t[letter][n] for t in told]).to(device) for n in tree}
    private = mine.get(own.PRIVATE, {})
    apart = frozenset(private) & whole.params.keys()
    around = Around(
        {name: private[name] if name in apart else p for name, p in whole.params.items()},
        apart,
        unflatten(to_device(shared, device)),
        mine,
        steps=steps.to(device, torch.float32),
    )
    start = dict(private)
    if rule.begin is not None or rule.joint:
        start |= around.over(lambda now: own.start(rule, now.anchor, now.shared, now.own))
    return around._replace(start=start)


class Closed(NamedTuple):
    """What a round leaves of C clients.

    Args:
        delta: name -> (C, *shape), where it is not trained minus anchor.
        uploads: ``letter/name`` -> (C, *shape).
        kept: ``letter/name`` -> (C, *shape); empty where nothing is.
        whole: (C,) bool, whose is finite.
    """

    delta: Tree
    uploads: Tree
    kept: Tree
    whole: Tensor


def closed(
    runtime: ClientRuntime, around: Around, tensors: Tree, taken: own.Taken, lr: float
) -> Closed:
    """What the clients of a chunk send and keep.

    Args:
        runtime: whose rule counts.
        around: what they began with.
        tensors: name -> (C, *shape), as a kernel trained them.
        taken: of each, (C,).
        lr: the learning rate of the round.
    """
    rule, momentum = runtime.rule, runtime.run.client.momentum
    trained = {n: t for n, t in tensors.items() if n in around.anchor or "/" in n}

    def one(now: Around, params: Tree, *figures: Tensor) -> own.Left:
        return own.end(rule, params, now.local(params), own.Taken(*figures), lr, momentum)

    left = around.over(one, trained, *taken)
    keeps: dict[str, Tree] = dict(left.own)
    if (private := around.own.get(own.PRIVATE)) is not None:
        keeps[own.PRIVATE] = {n: tensors.get(n, before) for n, before in private.items()}
    kept = flatten(keeps)
    whole = torch.ones(len(taken.steps), dtype=torch.bool)
    for tensor in kept.values():
        if tensor.dtype.is_floating_point:
            whole &= (
                tensor.isfinite().flatten(1).all(1).cpu()
                if tensor.dim() > 1
                else (tensor.isfinite().cpu())
            )
    return Closed(left.delta, left.uploads, kept, whole)


def _stacks(
    fresh: Trees, clients: Sequence[str], kept: Sequence[Tree | None], device: torch.device
) -> dict[str, dict[str, Tensor]]:
    if all(tree is None for tree in kept):
        count = len(clients)
        return {
            letter: map_tree(lambda t: t.expand(count, *t.shape), tree)
            for letter, tree in fresh.items()
        }
    each: list[Mapping[str, Tree]] = [
        own.restored(tree, fresh, client) for client, tree in zip(clients, kept, strict=True)
    ]
    return {
        letter: {
            name: torch.stack([trees[letter][name].to(device) for trees in each]) for name in tree
        }
        for letter, tree in fresh.items()
    }
