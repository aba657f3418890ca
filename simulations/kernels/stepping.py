"""The loop of the kernels that keep the parameters of all clients of a chunk as stacks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from umbel.client import devices, optimizers
from umbel.core.trees import Tree
from umbel.simulations.kernels.around import Around
from umbel.simulations.kernels.draws import Draws
from umbel.simulations.kernels.kernel import Chunk, Subject, Trained
from umbel.strategies.parts import ClientRule
from umbel.tasks.task import Batch

Gradients: TypeAlias = Callable[
    [Tree, Around, Batch, Tensor | None, Draws | None],
    tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
]
"""(parameters (n, *shape), what else is read, batch (n, B, …), counts (n,), draws) -> the
gradients, and the sums of the figures (n,), of the first ``counts`` examples of each; of all B
where that is ``None``."""


def train(
    subject: Subject,
    gradients: Gradients,
    anchor: Tree,
    chunk: Chunk,
    lr: float,
    lay: Callable[[Tensor], Tensor] = torch.Tensor.contiguous,
) -> Trained:
    """Trains the chunk's clients; those that have finished leave from the end of the stacks.

    Args:
        subject: whose settings count.
        gradients: of one step.
        anchor: the global parameters.
        chunk: the clients and their batches.
        lr: the learning rate of the round.
        lay: puts a stack of parameters into the kernel's own memory layout.
    """
    section, device = subject.runtime.run.client, subject.runtime.device
    clients = chunk.clients()
    rule = subject.runtime.rule
    around = chunk.around or Around(anchor)
    params = {
        name: lay(around.start[name].clone())
        if name in around.start
        else lay(p.expand(clients, *p.shape).clone())
        for name, p in anchor.items()
    }
    params |= {name: lay(p.clone()) for name, p in around.start.items() if "/" in name}
    optimizer = optimizers.Stacked(section, lr)
    draws = None if chunk.seeds is None else Draws(chunk.seeds, device)
    totals: dict[str, Tensor] = {}
    moving, views = clients, params
    for step, active in enumerate(chunk.active):
        if active != moving:
            moving, views = active, {name: p[:active] for name, p in params.items()}
        counts = None if chunk.full[step] else chunk.counts[step, :active]
        with devices.autocast(device, section):
            now = around.at(step, active)
            gradient, sums = gradients(views, now, chunk.batch(step), counts, draws)
        before = None if rule.after is None else {n: p.clone() for n, p in views.items()}
        optimizer.step(list(views.values()), [gradient[name] for name in views])
        if before is not None:
            settle(rule, now, views, gradient, before)
        if totals:
            for name, value in sums.items():
                totals[name][:active] += value
        else:  # everybody takes the first step
            totals = {name: value.clone() for name, value in sums.items()}
    return Trained(params, totals)


def settle(
    rule: ClientRule, around: Around, params: Tree, gradient: Mapping[str, Tensor], before: Tree
) -> None:
    """What the rule makes of a step, in place."""

    def one(now: Around, stepped: Tree, given: Tree, old: Tree) -> dict[str, Tensor]:
        assert rule.after is not None
        return dict(rule.after(stepped, given, now.local(old)))

    settled = around.over(one, dict(params), dict(gradient), dict(before))
    for name, p in params.items():
        p.copy_(settled[name])
