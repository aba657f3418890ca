"""The loop of the kernels that keep the parameters of all clients of a chunk as stacks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from umbel.client import devices, optimizers
from umbel.core.trees import Tree
from umbel.simulations.kernels.draws import Draws
from umbel.simulations.kernels.kernel import Chunk, Subject, Trained
from umbel.tasks.task import Batch

Gradients: TypeAlias = Callable[
    [Tree, Tree, Batch, Tensor | None, Draws | None],
    tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
]
"""(parameters (n, *shape), global parameters, batch (n, B, …), counts (n,), draws) -> the
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
    params = {name: lay(p.expand(clients, *p.shape).clone()) for name, p in anchor.items()}
    optimizer = optimizers.Stacked(section, lr)
    draws = None if chunk.seeds is None else Draws(chunk.seeds, device)
    totals: dict[str, Tensor] = {}
    moving, views = clients, params
    for step, active in enumerate(chunk.active):
        if active != moving:
            moving, views = active, {name: p[:active] for name, p in params.items()}
        counts = None if chunk.full[step] else chunk.counts[step, :active]
        with devices.autocast(device, section):
            gradient, sums = gradients(views, anchor, chunk.batch(step), counts, draws)
        optimizer.step(list(views.values()), [gradient[name] for name in views])
        if totals:
            for name, value in sums.items():
                totals[name][:active] += value
        else:  # everybody takes the first step
            totals = {name: value.clone() for name, value in sums.items()}
    return Trained(params, totals)
