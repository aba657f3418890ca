"""Clients that train low-rank adapters of fewer ranks than the model's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from umbel.core import randomness
from umbel.core.errors import InputError
from umbel.core.settings import Count
from umbel.core.trees import Tree
from umbel.strategies.parts.low_rank import pairs
from umbel.strategies.parts.rule import NAMED, ClientRule, Local, Trees

Ranks: TypeAlias = Sequence[Count] | Mapping[str, Count]
"""One of these for each client, as its name falls; or a client's name -> its rank, and the
adapter's own for all others."""


def with_ranks(rule: ClientRule, ranks: Ranks | None) -> ClientRule:
    """``rule`` for clients of which each has its first rows of A and columns of B alone.

    A client starts with the other columns at 0 and never moves them, so that its product ``B A`` is
    of its rank, whatever the shapes that travel.
    """
    if ranks is None:
        return rule
    given = ranks

    def named(client: str) -> dict[str, Tensor]:
        return {"rank": torch.tensor(rank_of(given, client))}

    def begin(anchor: Tree, shared: Trees, own: Trees) -> dict[str, Tensor]:
        # Without its column of B, a row of A counts for nothing: it stays, and the delta small.
        factors = [pair.a for pair in pairs(anchor)]
        return {**cut(anchor, own[NAMED]["rank"]), **{a: anchor[a] for a in factors}}

    def transform(gradient: Tree, local: Local) -> dict[str, Tensor]:
        return cut(gradient, local.own[NAMED]["rank"])

    return rule._replace(
        named=named,
        speaks_of=tuple(given) if isinstance(given, Mapping) else (),
        begin=begin,
        grad_transforms=(*rule.grad_transforms, transform),
    )


def rank_of(ranks: Ranks, client: str) -> float:
    """A client's rank: a function of its name alone; infinite where only the adapter bounds it."""
    if isinstance(ranks, Mapping):
        return float(ranks.get(client, torch.inf))
    return float(ranks[randomness.torch_seed(0, "rank", 0, client) % len(ranks)])


def cut(tensors: Tree, rank: Tensor) -> dict[str, Tensor]:
    """``tensors`` with 0 in the rows of each A, and the columns of each B, from ``rank`` on."""
    found = dict(tensors)
    for pair in pairs(tensors):
        a, b = found[pair.a], found[pair.b]
        kept = torch.arange(len(a), device=a.device) < rank
        found[pair.a], found[pair.b] = a * kept[:, None], b * kept
    return found


def check_ranks(ranks: Ranks | None, params: Tree) -> None:
    """Refuses ranks that the model's adapters do not have.

    Raises:
        InputError: naming the first.
    """
    if ranks is None:
        return
    most = min((len(params[pair.a]) for pair in pairs(params)), default=0)
    wanted = ranks.values() if isinstance(ranks, Mapping) else ranks
    if above := [rank for rank in wanted if rank > most]:
        raise InputError(
            f"a client of rank {above[0]}, and adapters of rank {most}",
            where="[strategy] ranks",
            fix=f'adapter = {{ kind = "lora", rank = {max(above)} }}: the largest of all',
        )
