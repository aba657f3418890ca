"""Functions and methods of torch that a forward pass may call, each for many clients at once.

A function sees what it would see in the model of one client, but for a leading axis of clients:
values are :class:`Value`, tensors that are the same for all clients are plain tensors, and shapes
are numbers. What is written here is torch's own function with its axes moved by one. Whether the
whole computes the right gradients is tried on real examples before a kernel is used.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from umbel.simulations.kernels.attention import attend
from umbel.simulations.kernels.kernel import Obstacle
from umbel.simulations.kernels.layers import Scope, Value, dropped, product, rows

Function: TypeAlias = Callable[..., Any]
"""(scope, the function's own arguments) -> value, values or numbers."""


def axis(dim: int) -> int:
    """Where an axis of one client's tensor is among all clients'."""
    return dim + 1 if dim >= 0 else dim


def _axes(dims: Any) -> tuple[int, ...]:
    return tuple(axis(d) for d in (dims if isinstance(dims, tuple | list) else (dims,)))


def aligned(scope: Scope, *given: Any) -> list[Any]:
    """Rows that broadcast as the clients' own tensors would; numbers stay."""
    found = [_rows(scope, x) if isinstance(x, Value | Tensor) else x for x in given]
    most = max([0, *[x.dim() for x in found if isinstance(x, Tensor)]])
    return [
        x.view(len(x), *[1] * (most - x.dim()), *x.shape[1:])
        if isinstance(x, Tensor) and x.dim() < most
        else x
        for x in found
    ]


def _rows(scope: Scope, x: Any) -> Tensor:
    if isinstance(x, Value):
        return x.as_rows()
    if isinstance(x, Tensor):
        return x.expand(scope.clients, *x.shape)
    raise Obstacle(f"it computes with a {type(x).__name__}")


def binary(function: Callable[..., Any]) -> Function:
    """An operation on pairs of numbers, with broadcasting."""

    def call(scope: Scope, left: Any, right: Any) -> Any:
        pair = [x for x in (left, right) if isinstance(x, Value)]
        if not pair:
            return function(left, right)
        five = all(x.images or x.tensor.dim() == 5 for x in pair)
        if len(pair) == 2 and five and (left.images or right.images):
            return Value(function(left.as_images(), right.as_images()), left.clients, True)
        if len(pair) == 1 and pair[0].images and not isinstance(left, Tensor | Value):
            return pair[0].like(function(left, right.tensor))
        if len(pair) == 1 and pair[0].images and not isinstance(right, Tensor | Value):
            return pair[0].like(function(left.tensor, right))
        return rows(function(*aligned(scope, left, right)))

    return call


def unary(function: Callable[..., Tensor]) -> Function:
    """A function of every number, with options that are none."""

    def call(scope: Scope, x: Value, **options: Any) -> Value:
        options.pop("inplace", None)
        return x.like(function(x.tensor, **options))

    return call


def pooling(function: Callable[..., Tensor]) -> Function:
    """A pooling of torch.nn.functional, with its further arguments."""

    def call(scope: Scope, x: Value, *args: Any, **options: Any) -> Value:
        return Value(function(x.as_images(), *args, **options), x.clients, True)

    return call


def over_axis(function: Callable[..., Tensor]) -> Function:
    """A function along one axis."""

    def call(scope: Scope, x: Value, dim: int, **options: Any) -> Value:
        options.pop("_stacklevel", None)
        return rows(function(x.as_rows(), dim=axis(dim), **options))

    return call


def reduction(function: Callable[..., Tensor]) -> Function:
    """A sum or a mean over some axes."""

    def call(scope: Scope, x: Value, dim: Any, keepdim: bool = False) -> Value:
        dims = dim if isinstance(dim, tuple | list) else (dim,)
        if x.images and not keepdim and sorted(d % 4 for d in dims) == [2, 3]:
            pooled = function(x.tensor, (2, 3))
            return rows(pooled.view(len(pooled), x.clients, -1).transpose(0, 1))
        return rows(function(x.as_rows(), _axes(dims), keepdim))

    return call


def _view(scope: Scope, x: Value, *shape: Any) -> Value:
    sizes = shape[0] if len(shape) == 1 and isinstance(shape[0], tuple | list) else shape
    if not all(isinstance(n, int) for n in sizes):
        raise Obstacle("a view as another type")
    return rows(x.as_rows().reshape(x.clients, *sizes))


def _flatten(scope: Scope, x: Value, start_dim: int = 0, end_dim: int = -1) -> Value:
    return rows(x.as_rows().flatten(axis(start_dim), axis(end_dim)))


def _permute(scope: Scope, x: Value, *dims: Any) -> Value:
    order = dims[0] if len(dims) == 1 and isinstance(dims[0], tuple | list) else dims
    own = x.as_rows()
    return rows(own.permute(0, *(d % (own.dim() - 1) + 1 for d in order)))


def _transpose(scope: Scope, x: Value, dim0: int, dim1: int) -> Value:
    return rows(x.as_rows().transpose(axis(dim0), axis(dim1)))


def _unsqueeze(scope: Scope, x: Value, dim: int) -> Value:
    return rows(x.as_rows().unsqueeze(axis(dim)))


def _squeeze(scope: Scope, x: Value, dim: Any) -> Value:
    return rows(x.as_rows().squeeze(_axes(dim)))


def _expand(scope: Scope, x: Value, *sizes: int) -> Value:
    own = x.as_rows()
    own = own.view(len(own), *[1] * (len(sizes) + 1 - own.dim()), *own.shape[1:])
    return rows(own.expand(-1, *sizes))


def _item(scope: Scope, x: Any, index: Any) -> Any:
    if not isinstance(x, Value):
        return x[index]
    at = index if isinstance(index, tuple) else (index,)
    if not all(i is None or i is ... or isinstance(i, int | slice) for i in at):
        raise Obstacle("it picks by the value of a tensor")
    return rows(x.as_rows()[(slice(None), *at)])


def _several(function: Callable[..., Any]) -> Function:
    def call(scope: Scope, x: Value, count: Any, dim: int = 0) -> tuple[Value, ...]:
        return tuple(rows(part) for part in function(x.as_rows(), count, axis(dim)))

    return call


def _unbind(scope: Scope, x: Value, dim: int = 0) -> tuple[Value, ...]:
    return tuple(rows(part) for part in x.as_rows().unbind(axis(dim)))


def _method(name: str) -> Function:
    """A method that looks at one number at a time."""

    def call(scope: Scope, x: Value, *args: Any, **options: Any) -> Value:
        if any(isinstance(a, Value | Tensor) for a in (*args, *options.values())):
            raise Obstacle(f"'{name}' with another tensor")
        return x.like(getattr(x.tensor, name)(*args, **options))

    return call


def _where(scope: Scope, condition: Any, left: Any, right: Any) -> Value:
    return rows(torch.where(*aligned(scope, condition, left, right)))


def _together(function: Callable[..., Tensor]) -> Function:
    def call(scope: Scope, parts: Any, dim: int = 0) -> Value:
        return rows(function([_rows(scope, part) for part in parts], axis(dim)))

    return call


def _matmul(scope: Scope, left: Any, right: Any) -> Value:
    pair = _rows(scope, left), _rows(scope, right)
    if min(x.dim() for x in pair) < 3:
        raise Obstacle("a product with a vector")
    return rows(torch.matmul(*aligned(scope, *map(rows, pair))))


def _linear(scope: Scope, x: Value, weight: Any, bias: Any = None) -> Value:
    own = None if bias is None else _rows(scope, bias)
    return rows(product(x.as_rows(), _rows(scope, weight), own))


def _masked_fill(scope: Scope, x: Value, mask: Any, value: float) -> Value:
    own, at = aligned(scope, x, mask)
    return rows(own.masked_fill(at, value))


def _dropout(
    scope: Scope, x: Value, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Value:
    if not training or not p:
        return x
    if p == 1:
        raise Obstacle("a dropout of everything")
    return rows(dropped(x.as_rows(), p, scope.draw))


def _attention(
    scope: Scope,
    query: Value,
    key: Value,
    value: Value,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Value:
    if enable_gqa:
        raise Obstacle("attention in groups")
    mask = attn_mask
    if isinstance(mask, Value):
        mask = aligned(scope, query, mask)[1]
    q, k, v = (x.as_rows() for x in (query, key, value))
    return rows(attend(q, k, v, mask, is_causal, scale, dropout_p, scope.draw))


def _size(scope: Scope, x: Any, dim: int | None = None) -> Any:
    shape = x.as_rows().shape[1:] if isinstance(x, Value) else x.shape
    return shape if dim is None else shape[dim]


def _attribute(scope: Scope, x: Any, name: str) -> Any:
    own = x.as_rows() if isinstance(x, Value) else x
    if name in ("dtype", "device"):
        return getattr(own, name)
    if name == "shape":
        return _size(scope, x)
    if name in ("ndim", "T", "mT") and isinstance(x, Value):
        return own.dim() - 1 if name == "ndim" else rows(own.transpose(-1, -2))
    raise Obstacle(f"no kernel knows '{name}'")


def _as_it_is(scope: Scope, x: Value) -> Value:
    return x


def _same_for_all(function: Callable[..., Tensor]) -> Function:
    """What makes a tensor out of numbers, or out of a tensor that all clients share."""

    def call(scope: Scope, *args: Any, **options: Any) -> Any:
        if any(isinstance(a, Value) for a in (*args, *options.values())):
            raise Obstacle(f"no kernel knows '{function.__name__}'")
        return function(*args, **options)

    return call


_ADD, _MULTIPLY = binary(operator.add), binary(operator.mul)
_SUBTRACT, _DIVIDE = binary(operator.sub), binary(operator.truediv)

FUNCTIONS: dict[Any, Function] = {
    **dict.fromkeys((F.relu, torch.relu, "relu", "relu_"), unary(torch.relu)),
    **dict.fromkeys((F.tanh, torch.tanh, "tanh"), unary(torch.tanh)),
    **dict.fromkeys((F.sigmoid, torch.sigmoid, "sigmoid"), unary(torch.sigmoid)),
    **{f: unary(f) for f in (F.silu, F.gelu, F.elu, F.leaky_relu, F.softplus)},
    **dict.fromkeys((torch.exp, "exp"), unary(torch.exp)),
    **dict.fromkeys((torch.sqrt, "sqrt"), unary(torch.sqrt)),
    **{f: pooling(f) for f in (F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d)},
    torch.max_pool2d: pooling(torch.max_pool2d),
    **dict.fromkeys((operator.add, operator.iadd, torch.add, "add", "add_"), _ADD),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul, "mul"), _MULTIPLY),
    **dict.fromkeys((operator.sub, torch.sub, "sub"), _SUBTRACT),
    **dict.fromkeys((operator.truediv, torch.div, "div"), _DIVIDE),
    **{f: binary(f) for f in (operator.floordiv, operator.mod, operator.pow)},
    **{f: binary(f) for f in (operator.eq, operator.ne, operator.lt, operator.gt)},
    torch.where: _where,
    operator.neg: unary(operator.neg),
    **dict.fromkeys((operator.matmul, torch.matmul, torch.bmm, "matmul", "bmm"), _matmul),
    F.linear: _linear,
    **dict.fromkeys((F.softmax, torch.softmax, "softmax"), over_axis(torch.softmax)),
    **dict.fromkeys((F.log_softmax, "log_softmax"), over_axis(torch.log_softmax)),
    **dict.fromkeys((torch.mean, "mean"), reduction(torch.mean)),
    **dict.fromkeys((torch.sum, "sum"), reduction(torch.sum)),
    **dict.fromkeys(("view", "reshape"), _view),
    **dict.fromkeys((torch.flatten, "flatten"), _flatten),
    **dict.fromkeys((torch.permute, "permute"), _permute),
    **dict.fromkeys((torch.transpose, "transpose"), _transpose),
    **dict.fromkeys((torch.unsqueeze, "unsqueeze"), _unsqueeze),
    **dict.fromkeys((torch.squeeze, "squeeze"), _squeeze),
    "expand": _expand,
    "contiguous": _as_it_is,
    **{name: _method(name) for name in ("to", "float", "long", "clamp", "square")},
    operator.getitem: _item,
    **dict.fromkeys((torch.chunk, "chunk"), _several(torch.chunk)),
    **dict.fromkeys((torch.split, "split"), _several(torch.split)),
    **dict.fromkeys((torch.unbind, "unbind"), _unbind),
    torch.cat: _together(torch.cat),
    torch.stack: _together(torch.stack),
    **dict.fromkeys((torch.masked_fill, "masked_fill"), _masked_fill),
    F.dropout: _dropout,
    F.scaled_dot_product_attention: _attention,
    **dict.fromkeys((getattr,), _attribute),
    "size": _size,
    **{
        f: _same_for_all(f)
        for f in (torch.arange, torch.zeros, torch.ones, torch.full, torch.tril, torch.triu)
    },
}
"""Functions, and methods by name."""
