"""The layers that the traced kernels know, each for many clients at once.

A value is in one of two forms. *Rows*, (clients, B, …): what a batched product takes. *Images*,
(B, clients * channels, H, W), channels-last: what a convolution takes whose groups are the clients,
so that torch's own convolution and pooling run over all of them and a pixel of all clients is
contiguous. A client's parameters are the rows of stacks (clients, *shape).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from umbel.core.trees import Tree
from umbel.simulations.kernels.draws import Draw
from umbel.simulations.kernels.kernel import Obstacle


class Value(NamedTuple):
    """Activations of ``clients`` clients, as rows or as images."""

    tensor: Tensor
    clients: int
    images: bool

    def as_images(self) -> Tensor:
        """(B, clients * channels, H, W), channels-last."""
        if self.images:
            return self.tensor
        clients, batch, depth, height, width = self.tensor.shape
        pixels = self.tensor.permute(1, 3, 4, 0, 2).reshape(batch, height, width, clients * depth)
        # With one channel the reshape is a view, of pixels that lie apart.
        return pixels.contiguous().permute(0, 3, 1, 2)

    def as_rows(self) -> Tensor:
        """(clients, B, …)."""
        if not self.images:
            return self.tensor
        batch, _, height, width = self.tensor.shape
        return self.tensor.view(batch, self.clients, -1, height, width).transpose(0, 1)

    def like(self, tensor: Tensor) -> Value:
        """Another tensor in the same form."""
        return self._replace(tensor=tensor)


Stack: TypeAlias = Callable[[Tree, int], Tensor]
"""(parameters of the clients, how many) -> one of them, (clients, *shape)."""

Finder: TypeAlias = Callable[[Tensor | None], Stack | None]
"""Finds the stack of a parameter of the module; ``None`` where the layer has none."""

Layer: TypeAlias = Callable[..., Value]
"""(parameters of the clients, values …) -> value."""


def elementwise(function: Callable[[Tensor], Tensor]) -> Layer:
    """The same function of every number."""
    return lambda params, x: x.like(function(x.tensor))


def pooling(function: Callable[[Tensor], Tensor]) -> Layer:
    """A function of each channel."""

    def layer(params: Tree, x: Value) -> Value:
        return Value(function(x.as_images()), x.clients, True)

    return layer


def pooling_by(function: Callable[..., Tensor], args: list[Any], options: dict[str, Any]) -> Layer:
    """A pooling of torch.nn.functional, with its further arguments."""
    return pooling(lambda images: function(images, *args, **options))


def identity(params: Tree, x: Value) -> Value:
    """Nothing."""
    return x


def flatten(params: Tree, x: Value) -> Value:
    """(B, …) -> (B, features), for each client."""
    return Value(x.as_rows().flatten(2), x.clients, False)


def flatten_to(features: int) -> Layer:
    """(B, …) -> (B, features) by ``view(-1, features)``, where that keeps examples apart."""

    def layer(params: Tree, x: Value) -> Value:
        flat = flatten(params, x)
        if flat.tensor.shape[-1] != features:
            raise Obstacle(f"a view of {features} columns cuts examples of {flat.tensor.shape[-1]}")
        return flat

    return layer


def mean_over_pixels(params: Tree, x: Value) -> Value:
    """(B, channels, H, W) -> (B, channels), for each client."""
    pooled = x.as_images().mean((2, 3))
    return Value(pooled.view(len(pooled), x.clients, -1).transpose(0, 1), x.clients, False)


def add(params: Tree, left: Value, right: Value) -> Value:
    """The sum of two activations."""
    if left.images != right.images:
        left, right = (Value(v.as_images(), v.clients, True) for v in (left, right))
    return left.like(left.tensor + right.tensor)


def _conv2d(module: nn.Conv2d, find: Finder) -> Layer:
    if module.padding_mode != "zeros":
        raise Obstacle(f"padding_mode = '{module.padding_mode}' of a convolution")
    weight, bias = _must(find(module.weight)), find(module.bias)

    def layer(params: Tree, x: Value) -> Value:
        out = F.conv2d(
            x.as_images(),
            weight(params, x.clients).flatten(0, 1),
            None if bias is None else bias(params, x.clients).flatten(),
            module.stride,
            module.padding,
            module.dilation,
            module.groups * x.clients,
        )
        return Value(out, x.clients, True)

    return layer


def _linear(module: nn.Linear, find: Finder) -> Layer:
    weight, bias = _must(find(module.weight)), find(module.bias)

    def layer(params: Tree, x: Value) -> Value:
        rows = x.as_rows()
        flat = rows.reshape(x.clients, -1, rows.shape[-1])
        turned = weight(params, x.clients).transpose(1, 2)
        if bias is None:
            out = torch.bmm(flat, turned)
        else:
            out = torch.baddbmm(bias(params, x.clients)[:, None], flat, turned)
        return Value(out.view(*rows.shape[:-1], -1), x.clients, False)

    return layer


def _group_norm(module: nn.GroupNorm, find: Finder) -> Layer:
    weight, bias = find(module.weight), find(module.bias)

    def layer(params: Tree, x: Value) -> Value:
        scale, shift = (s and s(params, x.clients).flatten() for s in (weight, bias))
        groups = module.num_groups * x.clients
        return Value(F.group_norm(x.as_images(), groups, scale, shift, module.eps), x.clients, True)

    return layer


def _layer_norm(module: nn.LayerNorm, find: Finder) -> Layer:
    weight, bias = find(module.weight), find(module.bias)

    def layer(params: Tree, x: Value) -> Value:
        rows = x.as_rows()
        out = F.layer_norm(rows, module.normalized_shape, None, None, module.eps)
        between = [1] * (rows.dim() - 1 - len(module.normalized_shape))
        for stack, combine in ((weight, torch.mul), (bias, torch.add)):
            if stack is not None:
                own = stack(params, x.clients)
                out = combine(out, own.view(x.clients, *between, *module.normalized_shape))
        return Value(out, x.clients, False)

    return layer


def _embedding(module: nn.Embedding, find: Finder) -> Layer:
    options = (module.max_norm, module.padding_idx, module.scale_grad_by_freq, module.sparse)
    if options != (None, None, False, False):
        raise Obstacle("an option of an embedding")
    weight = _must(find(module.weight))

    def layer(params: Tree, x: Value) -> Value:
        rows = x.as_rows()
        # One table of all clients; a symbol that the client's own lacks must not find a neighbour.
        if int(rows.min()) < 0 or int(rows.max()) >= module.num_embeddings:
            raise IndexError("index out of range in self")
        first = torch.arange(x.clients, device=rows.device) * module.num_embeddings
        table = weight(params, x.clients).flatten(0, 1)
        at = rows + first.view(-1, *[1] * (rows.dim() - 1))
        return Value(F.embedding(at, table), x.clients, False)

    return layer


def _flatten(module: nn.Flatten, find: Finder) -> Layer:
    if (module.start_dim, module.end_dim) != (1, -1):
        raise Obstacle("a Flatten of some dimensions")
    return flatten


def _max_pool(module: nn.MaxPool2d, find: Finder) -> Layer:
    if module.return_indices:
        raise Obstacle("the indices of a pooling")
    return pooling(module)


def _pool(module: nn.Module, find: Finder) -> Layer:
    return pooling(module)


def _identity(module: nn.Module, find: Finder) -> Layer:
    return identity


def dropout(probability: float) -> Layer:
    """Dropout; takes what draws the masks as well."""
    if probability == 1:
        raise Obstacle("a dropout of everything")

    def layer(params: Tree, x: Value, draw: Draw | None) -> Value:
        if not probability:
            return x
        assert draw is not None
        rows = x.as_rows()
        kept = draw(rows, 1 - probability)
        return Value(rows * kept * (1 / (1 - probability)), x.clients, False)

    return layer


def _dropout(module: nn.Dropout, find: Finder) -> Layer:
    return dropout(module.p)


def _activation(function: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, Finder], Layer]:
    return lambda module, find: elementwise(function)


def _itself(module: nn.Module, find: Finder) -> Layer:
    return elementwise(module)


def _must(stack: Stack | None) -> Stack:
    assert stack is not None
    return stack


MODULES: dict[type[nn.Module], Callable[[Any, Finder], Layer]] = {
    nn.Conv2d: _conv2d,
    nn.Linear: _linear,
    nn.GroupNorm: _group_norm,
    nn.LayerNorm: _layer_norm,
    nn.Embedding: _embedding,
    nn.Flatten: _flatten,
    nn.MaxPool2d: _max_pool,
    nn.AvgPool2d: _pool,
    nn.AdaptiveAvgPool2d: _pool,
    nn.Dropout: _dropout,
    nn.Identity: _identity,
    nn.ReLU: _activation(torch.relu),
    nn.Tanh: _activation(torch.tanh),
    nn.Sigmoid: _activation(torch.sigmoid),
    nn.SiLU: _activation(F.silu),
    nn.GELU: _itself,
    nn.LeakyReLU: _itself,
    nn.ELU: _itself,
    nn.Softplus: _itself,
}
"""Exactly these types: a subclass may compute something else."""

FUNCTIONS: dict[Any, Callable[[Tensor], Tensor]] = {
    F.relu: torch.relu,
    torch.relu: torch.relu,
    "relu": torch.relu,
    F.tanh: torch.tanh,
    torch.tanh: torch.tanh,
    "tanh": torch.tanh,
    F.sigmoid: torch.sigmoid,
    torch.sigmoid: torch.sigmoid,
    "sigmoid": torch.sigmoid,
    F.silu: F.silu,
    F.gelu: F.gelu,
}
"""Functions and methods of one tensor and no option."""

POOLINGS: dict[Any, Callable[..., Tensor]] = {
    F.max_pool2d: F.max_pool2d,
    F.avg_pool2d: F.avg_pool2d,
    F.adaptive_avg_pool2d: F.adaptive_avg_pool2d,
    torch.max_pool2d: torch.max_pool2d,
}
