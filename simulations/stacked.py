"""Trains many clients in one torch.func computation: every parameter is a stack (C, *shape).

This is the kernel alone: how one chunk of clients is trained. Which clients make a chunk, and how
large it may be, is decided elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from umbel.client import devices, optimizers
from umbel.client.batches import Padded
from umbel.client.training import ClientRuntime
from umbel.core.trees import Tree
from umbel.strategies.parts import ClientRule, Local
from umbel.tasks.evaluate import add_sums, per_example
from umbel.tasks.task import Batch, Task

Gradients = Callable[..., tuple[dict[str, Tensor], dict[str, Tensor]]]


class Chunk(NamedTuple):
    """The work of C clients, those with most steps first.

    Args:
        columns: name -> (R, …): the examples, those of others too where that saves a copy.
        rows: (steps, C, B) int64: rows of ``columns``.
        counts: (steps, C) int64: how many of the B are the client's batch.
        active: how many clients take each step: the first so many.
        widths: the largest batch of each step.
        full: whether all batches of a step have that size.
    """

    columns: Batch
    rows: Tensor
    counts: Tensor
    active: list[int]
    widths: list[int]
    full: list[bool]

    @classmethod
    def of(cls, columns: Batch, padded: Padded, device: torch.device) -> Chunk:
        """From the schedules of clients whose ``rows`` are already into ``columns``."""
        active = (padded.counts > 0).sum(1)
        widths = padded.counts.max(1)
        # Batches that are still to come are 0, hence the sum and not the minimum.
        full = padded.counts.sum(1) == active * widths
        return cls(
            columns,
            torch.from_numpy(padded.rows).to(device),
            torch.from_numpy(padded.counts).to(device),
            active.tolist(),
            widths.tolist(),
            full.tolist(),
        )


def gradients(task: Task, rule: ClientRule, module: nn.Module) -> tuple[Gradients, Gradients]:
    """The gradients of a batch of each of n clients, and the sums of its figures.

    Returns:
        two functions of (parameters (n, *shape), global parameters, batch (n, B, …), counts (n,)).
        The first takes all B examples, the second the first ``counts`` of them.
    """

    def objective(
        params: Tree, anchor: Tree, batch: Batch, count: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        def forward(*inputs: Any, **named: Any) -> Tensor:
            output: Tensor = functional_call(module, dict(params), inputs, named)
            return output

        losses, figures = per_example(task, forward, batch)
        if count is None:
            mean = losses.mean()
        else:
            inside = torch.arange(len(losses), device=losses.device) < count
            # Padding repeats an example of the same batch, so it adds no infinity of its own; and
            # where, unlike a product with 0, keeps an infinite one out of the sum.
            mean = torch.where(inside, losses, 0).sum() / count
            figures = {name: torch.where(inside, v, 0) for name, v in figures.items()}
        sums: dict[str, Tensor] = {}
        add_sums(sums, figures, lambda v: v.sum())
        return rule.loss(mean, Local(params, anchor)), sums

    def one(params: Tree, anchor: Tree, batch: Batch, count: Tensor | None) -> Any:
        gradient, sums = grad(objective, has_aux=True)(params, anchor, batch, count)
        return dict(rule.gradient(gradient, Local(params, anchor))), sums

    return vmap(one, in_dims=(0, None, 0, None)), vmap(one, in_dims=(0, None, 0, 0))


class Kernel:
    """Trains chunks for one federation.

    Args:
        runtime: the plain twin; this trains as it does, with its run, task, rule and device.
        module: holds the frozen parameters and the buffers; the global model is loaded into it
            before each round.
    """

    def __init__(self, runtime: ClientRuntime, module: nn.Module) -> None:
        self._section = runtime.run.client
        self._device = runtime.device
        self._full, self._masked = gradients(runtime.task, runtime.rule, module)

    def train(self, anchor: Tree, chunk: Chunk, lr: float) -> tuple[dict[str, Tensor], Tree]:
        """Trains the chunk's clients from the global parameters ``anchor``.

        Returns:
            name -> (C, *shape), the local parameters; and name -> (C,), the sums of the figures
            over all examples seen.
        """
        clients = chunk.counts.shape[1]
        params = {
            name: p.expand(clients, *p.shape).clone(memory_format=torch.contiguous_format)
            for name, p in anchor.items()
        }
        optimizer = optimizers.Stacked(self._section, lr)
        totals: dict[str, Tensor] = {}
        moving, views = clients, params
        for step, active in enumerate(chunk.active):
            if active != moving:
                moving, views = active, {name: p[:active] for name, p in params.items()}
            batch = self.batch(chunk, step)
            with devices.autocast(self._device, self._section):
                if chunk.full[step]:
                    gradient, sums = self._full(views, anchor, batch, None)
                else:
                    counts = chunk.counts[step, :active]
                    gradient, sums = self._masked(views, anchor, batch, counts)
            optimizer.step(list(views.values()), [gradient[name] for name in views])
            if totals:
                for name, value in sums.items():
                    totals[name][:active] += value
            else:  # everybody takes the first step
                totals = {name: value.clone() for name, value in sums.items()}
        return params, totals

    def batch(self, chunk: Chunk, step: int) -> dict[str, Tensor]:
        """The examples of one step: name -> (n, B, …)."""
        at = chunk.rows[step, : chunk.active[step], : chunk.widths[step]]
        return {
            name: column.index_select(0, at.reshape(-1)).view(*at.shape, *column.shape[1:])
            for name, column in chunk.columns.items()
        }
