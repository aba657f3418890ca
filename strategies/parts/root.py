"""What a server trains on examples of its own, for strategies that trust nobody else's."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from umbel.core.trees import Tree
from umbel.strategies.parts.combine import Combiner

RootTrainer: TypeAlias = Callable[[int, Tree], Tree]
"""(round, the global tensors) -> the delta that the server's own training comes to."""


class Root(NamedTuple):
    """A strategy's wish for a root set.

    Args:
        examples: how many.
        combine: (what trains on them) -> the combiner that takes the place of the strategy's own.
    """

    examples: int
    combine: Callable[[RootTrainer], Combiner]
