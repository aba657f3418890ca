"""What the parts of a rule may read of many clients, as stacks, besides what these train."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor
from torch.func import vmap

from umbel.core.trees import Tree
from umbel.strategies.parts import Local, Trees
from umbel.strategies.parts.rule import NONE


class Around(NamedTuple):
    """Of n clients, in the order of a chunk.

    Args:
        anchor: name -> (*shape), the global parameters; (n, *shape) where a client has its own.
        apart: the names of those.
        shared: what the strategy broadcasts besides.
        own: what each client keeps, letter -> name -> (n, *shape).
        start: name -> (n, *shape), what training starts from, where that is not the anchor:
            parameters, trees that are trained along, and buffers.
        steps: (n,), how many each takes; ``None`` where nobody asks.
        step: how many have been taken.
    """

    anchor: Tree
    apart: frozenset[str] = frozenset()
    shared: Trees = NONE
    own: Trees = NONE
    start: Tree = NONE  # type: ignore[assignment]  # empty, and so of either kind
    steps: Tensor | None = None
    step: int = 0

    def at(self, step: int, active: int) -> Around:
        """The same for the first clients, before one of their steps."""
        if self.steps is None:
            return self._replace(step=step)
        return self._replace(
            anchor={n: a[:active] if n in self.apart else a for n, a in self.anchor.items()},
            own={k: {n: t[:active] for n, t in tree.items()} for k, tree in self.own.items()},
            steps=self.steps[:active],
            step=step,
        )

    def of(self, client: int) -> Around:
        """What the parts read of one client: everything without the first axis."""
        if self.steps is None:
            return self
        return self._replace(
            anchor={n: a[client] if n in self.apart else a for n, a in self.anchor.items()},
            apart=frozenset(),
            own={k: {n: t[client] for n, t in tree.items()} for k, tree in self.own.items()},
            start={n: t[client] for n, t in self.start.items()},
            steps=self.steps[client],
        )

    def local(self, params: Tree) -> Local:
        """What the parts read, where it is of one client."""
        steps = 0 if self.steps is None else self.steps
        return Local(params, self.anchor, self.shared, self.own, self.step, steps)

    def over(self, function: Callable[..., Any], *stacks: Any) -> Any:
        """``function(around, *rows)`` of every client at once, where ``around`` is its own."""
        if self.steps is None:
            return vmap(lambda *rows: function(self, *rows))(*stacks)

        def one(anchor: Tree, own: Trees, steps: Tensor, *rows: Any) -> Any:
            whole = {**self.anchor, **anchor}
            mine = self._replace(anchor=whole, apart=frozenset(), own=own, start={}, steps=steps)
            return function(mine, *rows)

        apart = {name: self.anchor[name] for name in self.apart}
        own = {letter: dict(tree) for letter, tree in self.own.items()}
        return vmap(one)(apart, own, self.steps, *stacks)
