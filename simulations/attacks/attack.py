"""What an attack is: poisoned data, forged updates, or both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from umbel.core import randomness
from umbel.core.payloads import Updates
from umbel.core.trees import Tree, map_tree
from umbel.datasets.federated import Arrays, FederatedData


@dataclass(frozen=True)
class Scene:
    """What hostile clients know when they forge their updates.

    Args:
        seed: of the run.
        round: 1 … rounds.
        hostile: who sends what is forged, by name.
        cohort: clients that the round asked.
        template: name -> (*shape), tensors such as an update has.
        own: what they trained themselves, rows in the order of ``hostile``; ``None`` unless the
            attack asks.
        honest: the updates of the round's honest clients, by name; ``None`` unless it asks.
        rule: what the server makes of updates, name -> (*shape).
    """

    seed: int
    round: int
    hostile: Sequence[str]
    cohort: int
    template: Tree
    own: Updates | None
    honest: Updates | None
    rule: Callable[[Updates], Tree]

    def rows(self) -> dict[str, Tensor]:
        """The honest updates of what can be forged, name -> (n, *shape) float64."""
        assert self.honest is not None
        return {n: self.honest.delta[n].double() for n in self.floating()}

    def floating(self) -> list[str]:
        """The tensors that can be forged; integers stay as they are."""
        return [n for n, t in self.template.items() if t.dtype.is_floating_point]

    def each(self, tree: Tree) -> dict[str, Tensor]:
        """The same for every hostile client: name -> (hostile, *shape)."""
        count = len(self.hostile)
        return map_tree(lambda t: t[None].expand(count, *t.shape), tree)

    def normal(self, client: str) -> Tree:
        """Standard normal draws of one client, name -> (*shape) float64."""
        draws = torch.Generator().manual_seed(
            randomness.torch_seed(self.seed, "attack", self.round, client)
        )
        shapes = {name: self.template[name].shape for name in self.floating()}
        return {
            name: torch.randn(shape, generator=draws, dtype=torch.float64)
            for name, shape in shapes.items()
        }


Forge: TypeAlias = Callable[[Scene], Tree]
"""Scene -> name -> (hostile, *shape), for the floating tensors; cast to their dtypes by others."""

Poison: TypeAlias = Callable[
    [FederatedData, np.ndarray[tuple[int], np.dtype[np.int64]], int], Arrays
]
"""(the data, rows of the hostile clients, seed) -> training columns in place of the data's."""


class Attack(NamedTuple):
    """An attack.

    Args:
        poison: what becomes of the training examples of hostile clients; ``None``: nothing.
        forge: what they send; ``None``: what they trained.
        sees: what :class:`Scene` holds besides: what hostile clients trained themselves, the
            honest updates of the round, or nothing.
        trigger: test columns -> those that the attack wants misread, with the label that it wants;
            their accuracy is the attack's success rate.
    """

    poison: Poison | None = None
    forge: Forge | None = None
    sees: Literal["own", "honest", "nothing"] = "nothing"
    trigger: Callable[[Arrays], Arrays] | None = None


def mean(rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """name -> (*shape): the mean of the rows."""
    return map_tree(lambda t: t.mean(0), rows)


def deviation(rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """name -> (*shape): the standard deviation over the rows, ddof 1; 0 where there is one."""
    return map_tree(lambda t: t.std(0) if len(t) > 1 else torch.zeros_like(t[0]), rows)
