"""What every defence against forgetting keeps to, around a strategy with momentum."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from umbel.core import registry
from umbel.core.payloads import Updates, pack, unpack
from umbel.core.settings import arguments
from umbel.core.trees import Model, Tree, flatten, map_tree, unflatten, zeros_like
from umbel.server.rounds import step
from umbel.strategies.fedavgm import fedavgm
from umbel.strategies.parts import ServerState, Strategy
from umbel.strategies.parts.defence import Classes, Defence, Turn, defended, turned

NAMES = registry.known("defences")
FIRST = Classes(torch.ones(1, 4, dtype=torch.bool), torch.zeros(4, dtype=torch.bool))
LATER = FIRST._replace(seen=torch.tensor([True, True, False, False]))


def build(name: str) -> tuple[Defence, Strategy]:
    factory = registry.find("defences", name, "[continual] defence")
    defence: Defence = factory(**arguments(factory, {}, "[continual] defence"))
    return defence, defended(fedavgm(momentum=0.5), defence, FIRST)


def params() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {"1.weight": torch.randn(4, 3), "1.bias": torch.randn(4).to(torch.bfloat16)}


def served(strategy: Strategy, start: Tree, state: ServerState, seed: int) -> Any:
    """The server's step on the updates of three clients; ``seed`` 0: none of them moved."""
    generator = torch.Generator().manual_seed(seed)
    like = {**start, **strategy.upload_template(start)}
    delta = map_tree(
        lambda t: (torch.rand(3, *t.shape, generator=generator) * min(seed, 1)).to(t.dtype), like
    )
    updates = Updates(1, ["a", "b", "c"], delta, torch.tensor([1.0, 2.0, 3.0]).double())
    sums = strategy.combine.add(strategy.combine.zero(like), updates)
    stepped, after = step(strategy, Model(start, {}), state, strategy.combine.finish(sums))
    return stepped.params, after


def same(left: Tree, right: Tree) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def kinds(tree: Tree) -> dict[str, Any]:
    return {n: (t.shape, t.dtype) for n, t in tree.items()}


@pytest.mark.parametrize("name", NAMES)
def test_a_defence_keeps_names_and_kinds_and_changes_nothing_in_place(name: str) -> None:
    defence, strategy = build(name)
    start = params()
    state = strategy.init(start)
    still, _ = served(strategy, start, state, 0)
    assert same(still, start)
    moved, after = served(strategy, start, state, 1)
    again, _ = served(strategy, start, state, 1)
    assert same(moved, again)
    assert not same(moved, start)
    importance = zeros_like(start) if defence.measure is None else map_tree(torch.abs, start)
    following = turned(strategy, defence, after, Turn(moved, LATER, importance))
    for later in (after, following):
        assert kinds(flatten(later)) == kinds(flatten(state))
    assert same(start, params())
    assert same(flatten(state), flatten(strategy.init(params())))


@pytest.mark.parametrize("name", NAMES)
def test_its_state_goes_through_disk_bit_for_bit(name: str) -> None:
    defence, strategy = build(name)
    moved, after = served(strategy, params(), strategy.init(params()), 1)
    state = turned(strategy, defence, after, Turn(moved, LATER, map_tree(torch.abs, moved)))
    tensors, _ = unpack(pack(flatten(state)))
    kept, restored = (served(strategy, moved, s, 2) for s in (state, unflatten(tensors)))
    assert same(kept[0], restored[0])
    assert same(flatten(kept[1]), flatten(restored[1]))
    if strategy.broadcast is not None:
        sent = flatten(strategy.broadcast(moved, state))
        assert same(sent, flatten(strategy.broadcast(moved, unflatten(tensors))))
        assert all(torch.isfinite(t.float()).all() for t in sent.values())


@pytest.mark.parametrize("name", ["adapters", "columns"])
def test_what_was_trained_in_an_earlier_experience_is_never_moved(name: str) -> None:
    defence, strategy = build(name)
    moved, after = served(strategy, params(), strategy.init(params()), 1)
    state = turned(strategy, defence, after, Turn(moved, LATER, {}))
    stepped, _ = served(strategy, moved, state, 2)  # its momentum would
    assert same(stepped, moved)
