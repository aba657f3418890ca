"""Which tensors of a model belong to its last layers, read off their names."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias

from umbel.core.settings import Count

Head: TypeAlias = Count | str
"""How many of a model's last layers, or a pattern of tensor names such as ``classifier.*``."""


def in_head(names: Sequence[str], head: int | str) -> frozenset[str]:
    """The names that belong to the head.

    A layer is what shares a name up to its last dot; layers come in the order of their first
    parameters, as the model was built.

    Args:
        names: of all tensors, parameters first, in the model's order.
        head: as :data:`Head`.
    """
    if isinstance(head, str):
        return frozenset(name for name in names if fnmatchcase(name, head))
    layers = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
    last = set(layers[-head:])
    return frozenset(name for name in names if name.rpartition(".")[0] in last)


def normalised(names: Sequence[str]) -> frozenset[str]:
    """The names that belong to layers with running statistics, such as BatchNorm's."""
    layers = {name.rpartition(".")[0] for name in names if name.endswith("running_mean")}
    return frozenset(name for name in names if name.rpartition(".")[0] in layers)
