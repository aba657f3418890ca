"""The plain layers that the traced kernels know, each for many clients at once.

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


class Scope(NamedTuple):
    """What a layer reads besides its inputs.

    Args:
        params: of the clients, and the buffers that training changes: name -> (clients, *shape).
        clients: how many.
        draw: the masks of this batch, where the model draws.
        keeps: whether ``params`` has the running statistics, for their layers to bring forward.
        taps: told what layers with parameters are given and give, where somebody asks.
    """

    params: Tree
    clients: int
    draw: Draw | None
    keeps: bool = False
    taps: Callable[[nn.Module, Value, Value], Value] | None = None


Stack: TypeAlias = Callable[[Scope], Tensor]
"""One parameter of the clients, (clients, *shape)."""

Finder: TypeAlias = Callable[[Tensor | None], Stack | None]
"""Finds the stack of a parameter of the module; ``None`` where the layer has none."""

Layer: TypeAlias = Callable[..., Any]
"""(scope, values …) -> value, or a tuple of values."""

Maker: TypeAlias = Callable[[Any, Finder], Layer]
"""(module, finder) -> its layer."""


def channels_last(stack: Tensor) -> Tensor:
    """A stack of convolution weights, so that many clients' are one channels-last weight."""
    if stack.dim() != 5:
        return stack.contiguous()
    return stack.movedim(2, -1).contiguous().movedim(-1, 2)


def rows(tensor: Tensor) -> Value:
    """A value (clients, B, …)."""
    return Value(tensor, len(tensor), False)


def must(stack: Stack | None) -> Stack:
    """A stack that a layer cannot be without."""
    assert stack is not None
    return stack


def elementwise(function: Callable[[Tensor], Tensor]) -> Layer:
    """The same function of every number."""
    return lambda scope, x: x.like(function(x.tensor))


def pooling(function: Callable[[Tensor], Tensor]) -> Layer:
    """A function of each channel."""

    def layer(scope: Scope, x: Value) -> Value:
        return Value(function(x.as_images()), x.clients, True)

    return layer


def identity(scope: Scope, x: Value) -> Value:
    """Nothing."""
    return x


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias`` of each client: (n, …, in), (n, out, in), (n, out) -> (n, …, out)."""
    flat = x.reshape(len(x), -1, x.shape[-1])
    turned = weight.transpose(1, 2)
    out = torch.bmm(flat, turned) if bias is None else torch.baddbmm(bias[:, None], flat, turned)
    return out.view(*x.shape[:-1], -1)


def _conv2d(module: nn.Conv2d, find: Finder) -> Layer:
    if module.padding_mode != "zeros":
        raise Obstacle(f"padding_mode = '{module.padding_mode}' of a convolution")
    weight, bias = must(find(module.weight)), find(module.bias)

    def layer(scope: Scope, x: Value) -> Value:
        out = F.conv2d(
            x.as_images(),
            weight(scope).flatten(0, 1),
            None if bias is None else bias(scope).flatten(),
            module.stride,
            module.padding,
            module.dilation,
            module.groups * x.clients,
        )
        return Value(out, x.clients, True)

    return layer


def unfolded(module: nn.Conv2d, find: Finder) -> Layer:
    """A convolution as one batched product over the clients, of unfolded images."""
    if module.padding_mode != "zeros" or module.groups != 1:
        raise Obstacle("a convolution with groups, or padded with something")
    weight, bias = must(find(module.weight)), find(module.bias)
    stride, dilation, reach = module.stride, module.dilation, module.kernel_size

    def pad(axis: int) -> tuple[int, int]:
        if isinstance(module.padding, tuple):
            return module.padding[axis], module.padding[axis]
        both = dilation[axis] * (reach[axis] - 1) if module.padding == "same" else 0
        return both // 2, both - both // 2

    edges = (*pad(1), *pad(0))

    def layer(scope: Scope, x: Value) -> Value:
        images = F.pad(x.as_rows(), edges)
        clients, batch = images.shape[:2]
        columns = F.unfold(images.flatten(0, 1), reach, dilation, 0, stride)
        height, width = (
            (size - step * (length - 1) - 1) // by + 1
            for size, step, length, by in zip(
                images.shape[3:], dilation, reach, stride, strict=True
            )
        )
        pixels = columns.view(clients, batch, columns.shape[1], -1).transpose(2, 3).flatten(1, 2)
        out = product(pixels, weight(scope).flatten(2), None if bias is None else bias(scope))
        return rows(out.view(clients, batch, height, width, -1).movedim(-1, 2))

    return layer


def _linear(module: nn.Linear, find: Finder) -> Layer:
    weight, bias = must(find(module.weight)), find(module.bias)

    def layer(scope: Scope, x: Value) -> Value:
        return rows(product(x.as_rows(), weight(scope), None if bias is None else bias(scope)))

    return layer


def _embedding(module: nn.Embedding, find: Finder) -> Layer:
    options = (module.max_norm, module.padding_idx, module.scale_grad_by_freq, module.sparse)
    if options != (None, None, False, False):
        raise Obstacle("an option of an embedding")
    weight = must(find(module.weight))

    def layer(scope: Scope, x: Value | Tensor) -> Value:
        symbols = x.expand(scope.clients, *x.shape) if isinstance(x, Tensor) else x.as_rows()
        # One table of all clients; a symbol that the client's own lacks must not find a neighbour.
        first = torch.arange(scope.clients, device=symbols.device) * module.num_embeddings
        table = weight(scope).flatten(0, 1)
        at = symbols + first.view(-1, *[1] * (symbols.dim() - 1))
        if torch.compiler.is_compiling():  # nothing is looked at; the look-up itself will fail
            beyond = (symbols < 0) | (symbols >= module.num_embeddings)
            at = torch.where(beyond, len(table), at)
        elif int(symbols.min()) < 0 or int(symbols.max()) >= module.num_embeddings:
            raise IndexError("index out of range in self")
        return rows(F.embedding(at, table))

    return layer


def _flatten(module: nn.Flatten, find: Finder) -> Layer:
    if (module.start_dim, module.end_dim) != (1, -1):
        raise Obstacle("a Flatten of some dimensions")
    return lambda scope, x: rows(x.as_rows().flatten(2))


def _max_pool(module: nn.MaxPool2d, find: Finder) -> Layer:
    if module.return_indices:
        raise Obstacle("the indices of a pooling")
    return pooling(module)


def _pool(module: nn.Module, find: Finder) -> Layer:
    return pooling(module)


def _identity(module: nn.Module, find: Finder) -> Layer:
    return identity


def dropped(x: Tensor, probability: float, draw: Draw | None, examples: int = 1) -> Tensor:
    """Dropout of rows, by each client's own draws; ``examples`` is their axis."""
    if not probability:
        return x
    assert draw is not None
    return x * draw(x, 1 - probability, examples) * (1 / (1 - probability))


def dropout(probability: float) -> Layer:
    """Dropout with this probability."""
    if probability == 1:
        raise Obstacle("a dropout of everything")

    def layer(scope: Scope, x: Value) -> Value:
        return rows(dropped(x.as_rows(), probability, scope.draw)) if probability else x

    return layer


def _dropout(module: nn.Dropout, find: Finder) -> Layer:
    return dropout(module.p)


def _activation(function: Callable[[Tensor], Tensor]) -> Maker:
    return lambda module, find: elementwise(function)


def _itself(module: nn.Module, find: Finder) -> Layer:
    return elementwise(module)


PLAIN: dict[type[nn.Module], Maker] = {
    nn.Conv2d: _conv2d,
    nn.Linear: _linear,
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
