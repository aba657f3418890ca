"""A model is a mapping from parameter name to tensor; functions over such trees are pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

Tree: TypeAlias = Mapping[str, Tensor]


class Model(NamedTuple):
    """The tensors that travel: what is learned, and what is only carried along.

    ``params`` are trained by gradients and stepped by the server's optimizer. ``buffers`` (running
    statistics, counters) are averaged and never stepped: an adaptive step on a BatchNorm variance
    can make it negative. Names are those of ``torch.nn.Module.state_dict``, unique over both.
    """

    params: Tree
    buffers: Tree

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor, parameters first, by name."""
        return {**self.params, **self.buffers}

    def bytes(self) -> int:
        """What one copy of the model weighs on the wire and in memory, in bytes."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())


def map_tree(function: Callable[..., Tensor], tree: Tree, *others: Tree) -> dict[str, Tensor]:
    """Applies ``function`` to the tensors of the same name; all trees have the same names."""
    return {name: function(tensor, *(o[name] for o in others)) for name, tensor in tree.items()}


def zeros_like(tree: Tree) -> dict[str, Tensor]:
    """A tree of zeros with the names, shapes, dtypes and devices of ``tree``."""
    return map_tree(torch.zeros_like, tree)


def subtract(left: Tree, right: Tree) -> dict[str, Tensor]:
    """``left - right``, tensor by tensor."""
    return map_tree(lambda a, b: a - b, left, right)


def norm(tree: Tree) -> Tensor:
    """The global L2 norm of the concatenated tree, a float64 scalar; 0 for an empty tree."""
    squares = [t.double().square().sum() for t in tree.values()]
    return torch.stack(squares).sum().sqrt() if squares else torch.zeros((), dtype=torch.float64)


def add_cast(base: Tensor, step: Tensor) -> Tensor:
    """``base + step`` in the dtype of ``base``; integers are rounded, not truncated."""
    if base.dtype.is_floating_point:
        return (base.to(step.dtype) + step).to(base.dtype)
    return (base.double() + step.double()).round().to(base.dtype)


def to_device(tree: Tree, device: torch.device | str) -> dict[str, Tensor]:
    """The same tree on ``device``; tensors already there are not copied."""
    return map_tree(lambda t: t.to(device), tree)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """A nested mapping of tensors as one flat one, names joined by ``/``."""
    flat: dict[str, Tensor] = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        if isinstance(value, Tensor):
            flat[path] = value
        else:
            flat.update(flatten(value, f"{path}/"))
    return flat


def unflatten(flat: Tree) -> dict[str, Any]:
    """The inverse of :func:`flatten`, for parts whose names hold no ``/`` (torch's never do)."""
    nested: dict[str, Any] = {}
    for path, tensor in flat.items():
        *folders, name = path.split("/")
        place = nested
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = tensor
    return nested
