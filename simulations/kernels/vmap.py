"""``torch.func.vmap`` over clients: whatever model torch has batching rules for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad

from umbel.client.passes import objective as own_objective
from umbel.core.trees import Tree
from umbel.simulations.kernels import stepping
from umbel.simulations.kernels.around import Around
from umbel.simulations.kernels.compiled import compiled
from umbel.simulations.kernels.draws import Draws
from umbel.simulations.kernels.kernel import Chunk, Obstacle, Subject, Trained
from umbel.strategies.parts import ClientRule
from umbel.tasks.evaluate import add_sums, per_example
from umbel.tasks.task import Batch, Task


class Vmap:
    """Trains a chunk as one computation of torch.func."""

    even = False

    def __init__(self, subject: Subject) -> None:
        if subject.draws:
            raise Obstacle("it draws random numbers in training")
        self._subject = subject
        runtime = subject.runtime
        step = gradients(runtime.task, runtime.rule, subject.module)
        self.gradients = compiled(step, runtime.device) if subject.compiled else step

    def train(self, anchor: Tree, chunk: Chunk, lr: float) -> Trained:
        """Trains the clients of ``chunk`` from the global parameters ``anchor``."""
        return stepping.train(self._subject, self.gradients, anchor, chunk, lr)


def gradients(task: Task, rule: ClientRule, module: nn.Module) -> stepping.Gradients:
    """The gradients of a batch of each of n clients, and the sums of its figures."""
    one = gradient(task, rule, module)

    def either(
        params: Tree, around: Around, batch: Batch, counts: Tensor | None, draws: Draws | None
    ) -> Any:
        return around.over(one, params, batch, *(() if counts is None else (counts,)))

    return either


def gradient(task: Task, rule: ClientRule, module: nn.Module) -> Callable[..., Any]:
    """The same of one client: (around, parameters, batch, how many count or ``None`` for all)."""

    def objective(
        params: Tree, around: Around, batch: Batch, count: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if rule.objective is not None:
            return apart(params, around, batch, count)

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
        return rule.loss(mean, around.local(params)), sums

    def apart(
        params: Tree, around: Around, batch: Batch, count: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        size = len(next(iter(batch.values())))
        mask = None if count is None else torch.arange(size, device=count.device) < count
        value, figures = own_objective(task, module, rule, around.local(params), batch, mask)
        if mask is not None:
            figures = {name: torch.where(mask, v, 0) for name, v in figures.items()}
        sums: dict[str, Tensor] = {}
        add_sums(sums, figures, lambda v: v.sum())
        return value, sums

    def one(around: Around, params: Tree, batch: Batch, count: Tensor | None = None) -> Any:
        found, sums = grad(objective, has_aux=True)(params, around, batch, count)
        return dict(rule.gradient(found, around.local(params))), sums

    return one
