"""Normalisations for many clients at once, and the running statistics that one of them keeps."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from umbel.core.trees import Tree
from umbel.simulations.kernels.layers import Finder, Layer, Maker, Scope, Value, rows

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
"""Layers through which the examples of a batch act on each other: a batch cannot be padded."""


def _group_norm(module: nn.GroupNorm, find: Finder) -> Layer:
    weight, bias = find(module.weight), find(module.bias)

    def layer(scope: Scope, x: Value) -> Value:
        scale, shift = (None if s is None else s(scope).flatten() for s in (weight, bias))
        groups = module.num_groups * x.clients
        return Value(F.group_norm(x.as_images(), groups, scale, shift, module.eps), x.clients, True)

    return layer


def _layer_norm(module: nn.LayerNorm, find: Finder) -> Layer:
    weight, bias = find(module.weight), find(module.bias)

    def layer(scope: Scope, x: Value) -> Value:
        given = x.as_rows()
        out = F.layer_norm(given, module.normalized_shape, None, None, module.eps)
        between = [1] * (given.dim() - 1 - len(module.normalized_shape))
        for stack, combine in ((weight, torch.mul), (bias, torch.add)):
            if stack is not None:
                own = stack(scope)
                out = combine(out, own.view(x.clients, *between, *module.normalized_shape))
        return rows(out)

    return layer


def _batch_norm(module: nn.BatchNorm1d | nn.BatchNorm2d, find: Finder) -> Layer:
    """The same sums over a client's batch as its own layer takes, a channel of a client each.

    The running statistics are the scope's stacks, changed in place; those that it lacks stay.
    """
    weight, bias = find(module.weight), find(module.bias)
    kept = [find(b) for b in (module.running_mean, module.running_var, module.num_batches_tracked)]

    def layer(scope: Scope, x: Value) -> Value:
        scale, shift = (None if s is None else s(scope).flatten() for s in (weight, bias))
        mean = variance = None
        momentum = module.momentum or 0.0
        if all(stack is not None for stack in kept) and scope.keeps:
            mean, variance, count = (stack(scope) for stack in kept if stack is not None)
            count += 1
            if module.momentum is None:  # all clients take each step together
                momentum = 1.0 / float(count[0])
            mean, variance = mean.view(-1), variance.view(-1)
        flat = x.as_images() if isinstance(module, nn.BatchNorm2d) else _channels(x.as_rows())
        out = F.batch_norm(flat, mean, variance, scale, shift, True, momentum, module.eps)
        if isinstance(module, nn.BatchNorm2d):
            return Value(out, x.clients, True)
        return rows(out.view(len(out), x.clients, -1, *out.shape[2:]).transpose(0, 1))

    return layer


def _channels(given: Tensor) -> Tensor:
    """(clients, B, channels, …) -> (B, clients * channels, …)."""
    return given.transpose(0, 1).flatten(1, 2)


def statistics(module: nn.Module) -> dict[str, Tensor]:
    """The buffers of BatchNorm layers that training changes, by their names in ``module``."""
    found: dict[str, Tensor] = {}
    for name, part in module.named_modules():
        if type(part) in BATCH_NORMS:
            prefix = f"{name}." if name else ""
            found |= {prefix + key: buffer for key, buffer in part.named_buffers(recurse=False)}
    return found


def stacked(buffers: Tree, clients: int) -> dict[str, Tensor]:
    """A copy of the buffers for each client, (clients, *shape)."""
    return {n: b.expand(clients, *b.shape).contiguous().clone() for n, b in buffers.items()}


NORMS: dict[type[nn.Module], Maker] = {
    nn.GroupNorm: _group_norm,
    nn.LayerNorm: _layer_norm,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
}
