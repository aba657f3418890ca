"""A strategy is data and pure functions. It does not know where clients live."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

from umbel.core.trees import Tree
from umbel.strategies.parts.combine import Combined, Combiner
from umbel.strategies.parts.rule import ClientRule

ServerState: TypeAlias = Mapping[str, Any]
"""What a server keeps between rounds: the paper's letter -> tree, or scalar tensor."""


class Strategy(NamedTuple):
    """A federated algorithm.

    Args:
        init: global parameters -> the server's state before round 1.
        client: what clients do besides minimising their loss.
        combine: how updates become one.
        server: (parameters, state, combined) -> (parameters, state). Pure: new tensors, same names,
            shapes and dtypes. Sees trained parameters only; buffers are averaged by the round loop.
    """

    init: Callable[[Tree], ServerState]
    client: ClientRule
    combine: Combiner
    server: Callable[[Tree, ServerState, Combined], tuple[Tree, ServerState]]
