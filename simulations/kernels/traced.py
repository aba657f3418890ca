"""The kernels that know a model's layers: ``grouped`` for images, ``stacked`` for everything else.

Both run the traced program on stacks of parameters, with autograd behind it. A hand-written
backward pass that fuses the step of SGD into the last product was measured at 0.9 of this time on
a small CNN: not worth a second rule for each layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from umbel.core.trees import Tree
from umbel.simulations.kernels import stepping
from umbel.simulations.kernels.around import Around
from umbel.simulations.kernels.compiled import compiled
from umbel.simulations.kernels.draws import Draws
from umbel.simulations.kernels.kernel import Chunk, Obstacle, Subject, Trained
from umbel.simulations.kernels.layers import channels_last, unfolded
from umbel.simulations.kernels.norms import stacked, statistics
from umbel.simulations.kernels.trace import NONE as NOTHING
from umbel.simulations.kernels.trace import Makers, Program, trace
from umbel.strategies.parts import ClientRule
from umbel.tasks.evaluate import add_sums, per_example
from umbel.tasks.task import Batch, Task


class Grouped:
    """Convolutional networks: one convolution whose groups are the clients, channels-last.

    On a CPU fast while the activations of a chunk stay in its cache: a few clients.

    Args:
        subject: what is trained.
        unfold: instead, a batched product over the clients, of unfolded images.
    """

    def __init__(self, subject: Subject, unfold: bool = False) -> None:
        self._subject = subject
        self._lay = torch.Tensor.contiguous if unfold else channels_last
        self._program = _program(subject, {nn.Conv2d: unfolded} if unfold else NOTHING)
        if not self._program.has(nn.Conv2d):
            raise Obstacle("it has no convolution")
        self.even = self._program.even()
        self.gradients = _step(subject, self._program)

    def train(self, anchor: Tree, chunk: Chunk, lr: float) -> Trained:
        """Trains the clients of ``chunk`` from the global parameters ``anchor``."""
        kept = started(self.statistics(chunk.clients()), chunk)
        compute = partial(self.gradients, kept=kept)
        trained = stepping.train(self._subject, compute, anchor, chunk, lr, self._lay)
        return trained._replace(tensors={**trained.tensors, **kept})

    def statistics(self, clients: int) -> dict[str, Tensor]:
        """The global model's running statistics, for each client to bring forward."""
        return stacked(statistics(self._subject.module), clients)


class Stacked:
    """Networks of products: one batched product for all clients, of a whole cohort if it fits."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._program = _program(subject)
        if self._program.has(nn.Conv2d):
            raise Obstacle("it has a convolution")
        self.even = self._program.even()
        self.gradients = _step(subject, self._program)

    def train(self, anchor: Tree, chunk: Chunk, lr: float) -> Trained:
        """Trains the clients of ``chunk`` from the global parameters ``anchor``."""
        kept = started(self.statistics(chunk.clients()), chunk)
        compute = partial(self.gradients, kept=kept)
        trained = stepping.train(self._subject, compute, anchor, chunk, lr)
        return trained._replace(tensors={**trained.tensors, **kept})

    def statistics(self, clients: int) -> dict[str, Tensor]:
        """The global model's running statistics, for each client to bring forward."""
        return stacked(statistics(self._subject.module), clients)


def started(kept: dict[str, Tensor], chunk: Chunk) -> dict[str, Tensor]:
    """Running statistics, each client's own where it has them."""
    own = {} if chunk.around is None else chunk.around.start
    return {name: own[name].clone() if name in own else stack for name, stack in kept.items()}


def _program(subject: Subject, instead: Makers = NOTHING) -> Program:
    if subject.runtime.rule.objective is not None or subject.runtime.rule.joint:
        raise Obstacle("the strategy has an objective of its own")
    if subject.draws and subject.runtime.run.client.accumulation > 1:
        raise Obstacle("its draws depend on the micro-batches")
    program = trace(subject.module, instead)
    if program.even() and subject.runtime.run.client.accumulation > 1:
        raise Obstacle("its batch statistics depend on the micro-batches")
    return program


NONE: Tree = MappingProxyType({})


Differentiate: TypeAlias = Callable[[Callable[[Tree], Any], Tree], Any]
"""(parameters -> a scalar and figures, parameters) -> its gradient and the figures."""


def backward(total: Callable[[Tree], Any], params: Tree) -> Any:
    """By autograd, which costs less around each operation than what can be compiled does."""
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
    value, figures = total(leaves)
    found = torch.autograd.grad(value, list(leaves.values()), materialize_grads=True)
    return dict(zip(leaves, found, strict=True)), figures


def composed(total: Callable[[Tree], Any], params: Tree) -> Any:
    """By torch.func, which can be compiled."""
    return torch.func.grad(total, has_aux=True)(dict(params))


def _step(subject: Subject, program: Program) -> Callable[..., Any]:
    task, rule = subject.runtime.task, subject.runtime.rule
    if not subject.compiled:
        return gradients(task, rule, program, backward)
    return compiled(gradients(task, rule, program, composed), subject.runtime.device)


def gradients(
    task: Task, rule: ClientRule, program: Program, differentiate: Differentiate
) -> Callable[..., Any]:
    """The gradients of a batch of each of n clients, and the sums of its figures.

    The losses are the task's own, of all examples of all clients at once: each depends on its
    example alone, and through the program on the parameters of its client alone. ``kept`` are the
    running statistics of all clients, brought forward in place.
    """

    even = program.even()

    def compute(
        params: Tree,
        around: Around,
        batch: Batch,
        counts: Tensor | None,
        draws: Draws | None,
        kept: Tree = NONE,
    ) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        clients, size = next(iter(batch.values())).shape[:2]
        draw = None if draws is None else draws.of_batch(counts)
        if counts is not None and even:
            raise Obstacle("examples of a batch act on each other, and batches differ in size")

        def total(leaves: Tree) -> tuple[Tensor, dict[str, Tensor]]:
            read = {**leaves, **{name: stack[:clients] for name, stack in kept.items()}}

            def forward(inputs: Tensor) -> Tensor:
                apart = inputs.view(clients, size, *inputs.shape[1:])
                return program(read, clients, apart, draw).flatten(0, 1)

            losses, figures = per_example(
                task, forward, {name: column.flatten(0, 1) for name, column in batch.items()}
            )
            losses = losses.view(clients, size)
            figures = {name: v.view(clients, size) for name, v in figures.items()}
            if counts is None:
                means = losses.mean(1)
            else:
                inside = torch.arange(size, device=losses.device) < counts[:, None]
                # See vmap.py on infinite losses.
                means = torch.where(inside, losses, 0).sum(1) / counts
                figures = {name: torch.where(inside, v, 0) for name, v in figures.items()}
            sums: dict[str, Tensor] = {}
            add_sums(sums, figures, lambda v: v.sum(1))
            if rule.loss_terms:
                means = around.over(lambda now, m, p: rule.loss(m, now.local(p)), means, leaves)
            return means.sum(), sums

        gradient, sums = differentiate(total, params)
        if rule.grad_transforms:
            gradient = around.over(
                lambda now, g, p: dict(rule.gradient(g, now.local(p))), gradient, dict(params)
            )
        return gradient, sums

    return compute
