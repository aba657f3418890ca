"""One client after another in one module: any model, with as little around torch as possible."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from umbel.client import devices, optimizers
from umbel.core.trees import Tree, map_tree
from umbel.simulations.kernels.around import Around
from umbel.simulations.kernels.compiled import compiled
from umbel.simulations.kernels.kernel import Chunk, Obstacle, Subject, Trained
from umbel.simulations.kernels.rectify import rectify_late
from umbel.simulations.kernels.vmap import gradient as gradient_of
from umbel.tasks.evaluate import add_sums
from umbel.tasks.task import Batch

GATHERED = 2**22
"""Bytes of examples that are put side by side at once."""


class Lean:
    """What :class:`ClientRuntime` does, without a module, an optimizer and a copy for each client.

    Takes the same draws, and keeps each client's buffers. Convolutions run channels-last, which is
    up to twice as fast on a CPU, except where the model draws: in another memory format the same
    seed drops other units.
    """

    even = False

    def __init__(self, subject: Subject) -> None:
        if subject.runtime.run.client.precision == "float16":
            raise Obstacle("float16 needs a scale of the loss for each client")
        self._subject = subject
        self._own = copy.deepcopy(subject.module).train()
        rectify_late(self._own)
        convolves = any(isinstance(m, nn.Conv2d) for m in self._own.modules())
        self._channels_last = convolves and not subject.draws
        if self._channels_last:
            self._own.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._params = {n: p for n, p in self._own.named_parameters() if p.requires_grad}
        self._stepped = [p.detach()[None] for p in self._params.values()]
        self._gradient = None
        if subject.compiled:
            if subject.draws:
                raise Obstacle("compiled, it would draw other random numbers")
            if subject.runtime.run.client.accumulation > 1:
                raise Obstacle("compiled, a step is of one piece, and [client] accumulation is set")
            runtime = subject.runtime
            self._gradient = compiled(
                gradient_of(runtime.task, runtime.rule, self._own), runtime.device
            )

    def train(self, anchor: Tree, chunk: Chunk, lr: float) -> Trained:
        """Trains the clients of ``chunk`` from the global parameters ``anchor``."""
        clients = chunk.clients()
        moving = {**map_tree(lambda p: p.detach(), self._params), **dict(self._own.named_buffers())}
        start = {**anchor, **dict(self._subject.module.named_buffers())}
        around = chunk.around or Around(anchor)
        stacks = {n: start[n].new_empty(clients, *t.shape) for n, t in moving.items()}
        stacks |= {n: torch.empty_like(t) for n, t in around.start.items() if "/" in n}
        totals: dict[str, Tensor] = {}
        widths = [[w for w in counts if w] for counts in chunk.counts.T.tolist()]
        device = self._subject.runtime.device
        follow = self._subject.runtime.task.follow
        for client in range(clients):
            mine = around.of(client)
            along = {n: t.clone() for n, t in mine.start.items() if "/" in n}
            for name, tensor in moving.items():
                tensor.copy_(mine.start.get(name, start[name]))
            optimizer = optimizers.Stacked(self._subject.runtime.run.client, lr)
            seen: dict[str, list[Tensor]] = {}
            with (
                devices.seeded(device, chunk.seeds[client])
                if chunk.seeds is not None
                else contextlib.nullcontext()
            ):
                for step, batch in enumerate(self._batches(chunk, client, widths[client])):
                    if follow is not None:
                        follow(self._own, step)
                    self._step(mine._replace(step=step), along, batch, optimizer, seen)
            for name, tensor in {**moving, **along}.items():
                stacks[name][client] = tensor
            sums: dict[str, Tensor] = {}
            add_sums(sums, {n: torch.cat(parts) for n, parts in seen.items()}, torch.Tensor.sum)
            for name, value in sums.items():
                totals.setdefault(name, value.new_zeros(clients))[client] = value
        return Trained(stacks, totals)

    def _step(
        self,
        around: Around,
        along: Tree,
        batch: Batch,
        optimizer: optimizers.Stacked,
        seen: dict[str, list[Tensor]],
    ) -> None:
        runtime = self._subject.runtime
        trained: Tree = self._params
        stepped = self._stepped
        if along:
            leaves = {n: t.detach().requires_grad_() for n, t in along.items()}
            trained, stepped = {**trained, **leaves}, stepped + [t[None] for t in along.values()]
        if self._gradient is not None:
            detached = map_tree(lambda p: p.detach(), trained)
            whole, sums = self._gradient(around, detached, batch)
            for name, value in sums.items():
                seen.setdefault(name, []).append(value[None])
            self._settle(around, detached, stepped, whole, optimizer)
            return
        local = around.local(trained)
        size = len(next(iter(batch.values())))
        found: list[Tensor] = []
        for part in self._parts(batch, size):
            value, figures = runtime.objective(self._own, local, part)
            share = len(next(iter(part.values()))) / size
            gradients = torch.autograd.grad(
                value if share == 1 else value * share,
                list(trained.values()),
                materialize_grads=True,
            )
            if found:
                found = [a + b for a, b in zip(found, gradients, strict=True)]
            else:
                found = list(gradients)
            for name, values in figures.items():
                seen.setdefault(name, []).append(values)
        if runtime.rule.after is None and not runtime.rule.grad_transforms:
            optimizer.step(stepped, [g[None] for g in found])
            return
        gradient: Tree = dict(zip(trained, found, strict=True))
        detached = map_tree(lambda p: p.detach(), trained)
        if runtime.rule.grad_transforms:
            with torch.no_grad():
                gradient = runtime.rule.gradient(gradient, around.local(detached))
        self._settle(around, detached, stepped, gradient, optimizer)

    def _settle(
        self,
        around: Around,
        params: Tree,
        stepped: Sequence[Tensor],
        gradient: Tree,
        optimizer: optimizers.Stacked,
    ) -> None:
        """Takes the step, in place, and what the rule makes of it."""
        after = self._subject.runtime.rule.after
        with torch.no_grad():
            before = map_tree(torch.clone, params) if after is not None else {}
            optimizer.step(list(stepped), [gradient[name][None] for name in params])
            if after is not None:
                new = map_tree(torch.clone, params)
                for name, tensor in after(new, gradient, around.local(before)).items():
                    params[name].copy_(tensor)

    def _parts(self, batch: Batch, size: int) -> list[Batch]:
        """A step's batch as its micro-batches."""
        pieces = min(self._subject.runtime.run.client.accumulation, size)
        if pieces == 1:
            return [batch]
        ends = [0, *np.cumsum([len(part) for part in np.array_split(np.arange(size), pieces)])]
        return [
            {name: column[begin:end] for name, column in batch.items()}
            for begin, end in pairwise(ends)
        ]

    def _batches(self, chunk: Chunk, client: int, widths: Sequence[int]) -> Iterator[Batch]:
        """What a client steps on: gathered for several steps at once, and handed out as views."""
        row = sum(column[:1].nbytes for column in chunk.columns.values())
        steps = max(1, GATHERED // (row * max(widths, default=1)))
        for first in range(0, len(widths), steps):
            taken = list(widths[first : first + steps])
            rows = [chunk.rows[first + i, client, :width] for i, width in enumerate(taken)]
            at = torch.cat(rows)
            held = {name: column.index_select(0, at) for name, column in chunk.columns.items()}
            if self._channels_last:
                held = map_tree(lambda t: _channels_last(t) if t.dim() == 4 else t, held)
            parts = {name: torch.split(column, taken) for name, column in held.items()}
            for i in range(len(taken)):
                yield {name: views[i] for name, views in parts.items()}


def _channels_last(images: Tensor) -> Tensor:
    """Images (B, C, H, W), channels-last; those of one channel say so by their strides alone."""
    if images.shape[1] > 1:
        return images.contiguous(memory_format=torch.channels_last)
    height, width = images.shape[2:]
    return images.as_strided(images.shape, (height * width, 1, width, 1))
