"""What clients of an asynchronous run are back with: weighed, and kept until it is due."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from umbel.core.payloads import Failure, Updates
from umbel.core.trees import Model, Tree
from umbel.strategies.parts.asynchronous import Asynchronous


def own_models(updates: Updates, model: Model) -> Updates:
    """The clients' models in place of their deltas; booleans stay differences."""
    given = model.tensors()
    delta = {
        name: stack + given[name] if name in given and stack.dtype is not torch.bool else stack
        for name, stack in updates.delta.items()
    }
    return replace(updates, delta=delta)


def weighed(updates: Updates, rule: Asynchronous, stale: int, model: Model) -> Updates:
    """One client's updates for this step: seen from the model of now, times what they count for."""
    factor, now = rule.discount(stale), model.tensors()

    def due(name: str, stack: Tensor) -> Tensor:
        if rule.towards and name in now and stack.dtype is not torch.bool:
            stack = stack.double() - now[name].double()
        return stack if factor == 1 else stack.double() * factor

    delta = {name: due(name, stack) for name, stack in updates.delta.items()}
    return replace(updates, delta=delta)


Flight: TypeAlias = dict[tuple[str, int], Updates | Failure]
"""(client, version that it was given) -> what it will be back with. A client can be in it twice: it
is back, and gone again, in one period."""


def stored(flight: Flight) -> dict[str, Tensor]:
    """What is in flight as tensors by name, for a checkpoint."""
    found: dict[str, Tensor] = {}
    notes: list[Any] = []
    for i, ((client, version), back) in enumerate(flight.items()):
        if isinstance(back, Failure):
            notes.append([client, version, back.reason])
            continue
        notes.append([client, version, back.round])
        found |= {f"{i}/delta/{name}": stack for name, stack in back.delta.items()}
        found |= {f"{i}/metrics/{name}": values for name, values in back.metrics.items()}
        found[f"{i}/weights"] = back.weights
    if notes:
        text = json.dumps(notes).encode()
        found["notes"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return found


def restored(tensors: Tree) -> Flight:
    """The inverse of :func:`stored`."""
    if "notes" not in tensors:
        return {}
    flight: Flight = {}
    for i, (client, version, said) in enumerate(json.loads(bytes(tensors["notes"].tolist()))):
        if isinstance(said, str):
            flight[client, version] = Failure(client, said)
            continue

        def below(kind: str, start: str = f"{i}/") -> dict[str, Tensor]:
            whole = f"{start}{kind}/"
            return {n.removeprefix(whole): t for n, t in tensors.items() if n.startswith(whole)}

        delta, metrics = below("delta"), below("metrics")
        flight[client, version] = Updates(said, [client], delta, tensors[f"{i}/weights"], metrics)
    return flight
