"""Puts the updates of chunks together again, in the order of a plan."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from umbel.core.payloads import Updates
from umbel.simulations.chunks import Places


def join(parts: Sequence[Updates]) -> Updates:
    """One stack of several; at least one."""
    return Updates(
        parts[0].round,
        [c for part in parts for c in part.clients],
        {n: torch.cat([part.delta[n] for part in parts]) for n in parts[0].delta},
        torch.cat([part.weights for part in parts]),
        {n: torch.cat([part.metrics[n] for part in parts]) for n in parts[0].metrics},
    )


def scatter(
    stacks: Updates | None, updates: Updates, places: Places, clients: list[str]
) -> Updates:
    """Puts ``updates`` at ``places`` of ``stacks``, which are made when there are none."""

    def room(stack: Tensor) -> Tensor:
        return stack.new_zeros(len(clients), *stack.shape[1:])

    if stacks is None:
        stacks = Updates(
            updates.round,
            clients,
            {n: room(s) for n, s in updates.delta.items()},
            room(updates.weights),
            {n: room(s) for n, s in updates.metrics.items()},
        )
    index = torch.from_numpy(places)
    for name, stack in updates.delta.items():
        stacks.delta[name].index_copy_(0, index.to(stack.device), stack)
    stacks.weights.index_copy_(0, index, updates.weights)
    for name, stack in updates.metrics.items():
        stacks.metrics[name].index_copy_(0, index, stack)
    return stacks


def rows(stacks: Updates, start: int, stop: int) -> Updates:
    """Consecutive rows, as views."""
    return Updates(
        stacks.round,
        stacks.clients[start:stop],
        {n: s[start:stop] for n, s in stacks.delta.items()},
        stacks.weights[start:stop],
        {n: s[start:stop] for n, s in stacks.metrics.items()},
    )
