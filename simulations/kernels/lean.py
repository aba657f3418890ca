"""One client after another in one module: any model, with as little around torch as possible."""

from __future__ import annotations

import contextlib
import copy

import numpy as np
import torch
from torch import Tensor, nn

from umbel.client import devices, optimizers
from umbel.core.trees import Tree, map_tree
from umbel.simulations.kernels.kernel import Chunk, Obstacle, Subject, Trained
from umbel.strategies.parts import Local
from umbel.tasks.evaluate import add_sums, per_example
from umbel.tasks.task import Batch


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
        convolves = any(isinstance(m, nn.Conv2d) for m in self._own.modules())
        self._channels_last = convolves and not subject.draws
        if self._channels_last:
            self._own.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._params = {n: p for n, p in self._own.named_parameters() if p.requires_grad}
        self._stepped = [p.detach()[None] for p in self._params.values()]

    def train(self, anchor: Tree, chunk: Chunk, lr: float) -> Trained:
        """Trains the clients of ``chunk`` from the global parameters ``anchor``."""
        clients = chunk.clients()
        moving = {**map_tree(lambda p: p.detach(), self._params), **dict(self._own.named_buffers())}
        start = {**anchor, **dict(self._subject.module.named_buffers())}
        stacks = {n: t.new_empty(clients, *t.shape) for n, t in start.items()}
        totals: dict[str, Tensor] = {}
        counts = chunk.counts.tolist()
        device = self._subject.runtime.device
        for client in range(clients):
            for name, tensor in moving.items():
                tensor.copy_(start[name])
            optimizer = optimizers.Stacked(self._subject.runtime.run.client, lr)
            sums: dict[str, Tensor] = {}
            with (
                devices.seeded(device, chunk.seeds[client])
                if chunk.seeds is not None
                else contextlib.nullcontext()
            ):
                for rows, width in zip(chunk.rows[:, client], counts, strict=True):
                    if width[client]:
                        self._step(anchor, chunk.columns, rows[: width[client]], optimizer, sums)
            for name, tensor in moving.items():
                stacks[name][client] = tensor
            for name, value in sums.items():
                totals.setdefault(name, value.new_zeros(clients))[client] = value
        return Trained(stacks, totals)

    def _step(
        self,
        anchor: Tree,
        columns: Batch,
        rows: Tensor,
        optimizer: optimizers.Stacked,
        sums: dict[str, Tensor],
    ) -> None:
        runtime = self._subject.runtime
        local = Local(self._params, anchor)
        pieces = min(runtime.run.client.accumulation, len(rows))
        found: list[Tensor] = []
        for piece in np.array_split(np.arange(len(rows)), pieces):
            at = rows[piece[0] : piece[-1] + 1]
            batch = {name: column.index_select(0, at) for name, column in columns.items()}
            if self._channels_last:
                batch = map_tree(lambda t: _channels_last(t) if t.dim() == 4 else t, batch)
            with devices.autocast(runtime.device, runtime.run.client):
                losses, figures = per_example(runtime.task, self._own, batch)
            objective = runtime.rule.loss(losses.mean(), local) * (len(at) / len(rows))
            parts = torch.autograd.grad(
                objective, list(self._params.values()), materialize_grads=True
            )
            found = [a + b for a, b in zip(found, parts, strict=True)] if found else list(parts)
            add_sums(sums, figures, lambda v: v.sum())
        gradient: Tree = dict(zip(self._params, found, strict=True))
        with torch.no_grad():
            if runtime.rule.grad_transforms:
                detached = map_tree(lambda p: p.detach(), self._params)
                gradient = runtime.rule.gradient(gradient, Local(detached, anchor))
            optimizer.step(self._stepped, [gradient[name][None] for name in self._params])


def _channels_last(images: Tensor) -> Tensor:
    """Images (B, C, H, W), channels-last; those of one channel say so by their strides alone."""
    if images.shape[1] > 1:
        return images.contiguous(memory_format=torch.channels_last)
    height, width = images.shape[2:]
    return images.as_strided(images.shape, (height * width, 1, width, 1))
