"""A strategy is data and pure functions. It does not know where clients live."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

from umbel.core.trees import Model, Tree, flatten
from umbel.strategies.parts.asynchronous import Asynchronous
from umbel.strategies.parts.combine import Combined, Combiner
from umbel.strategies.parts.root import Root
from umbel.strategies.parts.rule import ClientRule, Trees

ServerState: TypeAlias = Mapping[str, Any]
"""What a server keeps between rounds: the paper's letter -> tree, or scalar tensor."""


class Strategy(NamedTuple):
    """A federated algorithm.

    All functions see the parameters that travel: without what the client rule keeps private.

    Args:
        init: global parameters -> the server's state before round 1.
        client: what clients do besides minimising their loss.
        combine: how updates become one.
        server: (parameters, state, combined) -> (parameters, state). Pure: new tensors, same names,
            shapes and dtypes. Sees trained parameters only; buffers are averaged by the round loop.
        broadcast: (parameters, state) -> what clients are sent besides the model.
        uploads: parameters -> trees of the names, shapes and dtypes of what a client sends besides
            its delta.
        buffers: (model before the step, combined) -> buffers that move otherwise than by their mean
            delta.
        figures: (parameters before the step, combined) -> name -> number, for the round's record.
        root: what the server itself trains, each round, on examples of its own; ``None``: nothing.
        asynchronous: when the server steps; ``None``: when a whole cohort has answered.
    """

    init: Callable[[Tree], ServerState]
    client: ClientRule
    combine: Combiner
    server: Callable[[Tree, ServerState, Combined], tuple[Tree, ServerState]]
    broadcast: Callable[[Tree, ServerState], Trees] | None = None
    uploads: Callable[[Tree], Trees] | None = None
    root: Root | None = None
    asynchronous: Asynchronous | None = None

    buffers: Callable[[Model, Combined], Tree] | None = None
    figures: Callable[[Tree, Combined], Mapping[str, float]] | None = None

    def travelling(self, model: Model) -> Model:
        """The tensors of ``model`` that travel."""
        private = private_names(self.client, model)
        if not private:
            return model
        return Model(
            {n: p for n, p in model.params.items() if n not in private},
            {n: b for n, b in model.buffers.items() if n not in private},
        )

    def upload_template(self, params: Tree) -> dict[str, Any]:
        """Zeros such as a client sends besides its delta, ``letter/name`` -> (*shape)."""
        if self.uploads is None:
            return {}
        # One number each: only names, shapes and dtypes count, and this goes to every worker.
        return {
            n: t.new_zeros(()).expand(t.shape) for n, t in flatten(self.uploads(params)).items()
        }


def private_names(rule: ClientRule, model: Model) -> frozenset[str]:
    """The tensors of ``model`` that never travel."""
    return frozenset() if rule.private is None else frozenset(rule.private(list(model.tensors())))
