"""Per-example gradients of any model: by ``torch.func.vmap``, or one example after another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from umbel.core.trees import Tree
from umbel.privacy.per_example import clipped
from umbel.privacy.per_example.clipped import Batch, Bounds, ClippedSum, Losses

MEMORY = 256 << 20
"""Bytes of per-example gradients that are held at once."""


class Vmapped:
    """``vmap(grad)``: whatever torch has batching rules for.

    Args:
        module: in training mode; its parameters that require gradients are those that count.
        losses: of a batch.
    """

    def __init__(self, module: nn.Module, losses: Losses) -> None:
        self._module, self._losses = module, losses
        self._params = {n: p for n, p in module.named_parameters() if p.requires_grad}

    def __call__(self, batch: Batch, bounds: Bounds) -> ClippedSum:
        """The sum over ``batch``."""
        params = {n: p.detach() for n, p in self._params.items()}
        held = max(1, MEMORY // sum(4 * p.numel() for p in params.values()))
        size = len(next(iter(batch.values())))
        parts = [
            _clip(self._gradients(params, {k: c[at : at + held] for k, c in batch.items()}), bounds)
            for at in range(0, size, held)
        ]
        return added(parts)

    def _gradients(self, params: Tree, batch: Batch) -> Tree:
        def objective(params: Tree, example: Batch) -> Tensor:
            def forward(*inputs: Any, **named: Any) -> Tensor:
                output: Tensor = functional_call(self._module, dict(params), inputs, named)
                return output

            return self._losses(forward, {n: c[None] for n, c in example.items()}).sum()

        each = vmap(grad(objective), in_dims=(None, 0), randomness="different")
        found: Tree = each(params, dict(batch))
        return found


class OneByOne:
    """A batch of one example, once for each: slow, and right for every model.

    Args:
        module: as for :class:`Vmapped`.
        losses: of a batch.
    """

    def __init__(self, module: nn.Module, losses: Losses) -> None:
        self._module, self._losses = module, losses
        self._params = {n: p for n, p in module.named_parameters() if p.requires_grad}

    def __call__(self, batch: Batch, bounds: Bounds) -> ClippedSum:
        """The sum over ``batch``."""
        parts = []
        for row in range(len(next(iter(batch.values())))):
            loss = self._losses(self._module, {n: c[row : row + 1] for n, c in batch.items()}).sum()
            found = torch.autograd.grad(loss, list(self._params.values()), materialize_grads=True)
            stack = {n: g[None] for n, g in zip(self._params, found, strict=True)}
            parts.append(_clip(stack, bounds))
        return added(parts)


def _clip(gradients: Tree, bounds: Bounds) -> ClippedSum:
    """The clipped sum of gradients name -> (B, *shape)."""
    rows = {n: g.detach().float().flatten(1) for n, g in gradients.items()}
    squares = {n: torch.linalg.vector_norm(g, dim=1).square() for n, g in rows.items()}
    factors, finite = bounds.factors(squares)
    if not bool(finite.all()):
        rows = {n: torch.where(finite[:, None], g, 0.0) for n, g in rows.items()}
    total = {n: (factors[n] @ g).view(gradients[n].shape[1:]) for n, g in rows.items()}
    return ClippedSum(total, clipped.short(squares, bounds, finite))


def added(parts: list[ClippedSum]) -> ClippedSum:
    """The sum over the batches of ``parts``, at least one."""
    total = parts[0].total
    for part in parts[1:]:
        total = {n: t + part.total[n] for n, t in total.items()}
    return ClippedSum(total, sum(part.short for part in parts))
