"""Every strategy is a row of helpers/conformance.py, and passes all that is asked here."""

from __future__ import annotations

import pytest
import torch
from helpers.conformance import TABLE, Row
from helpers.quadratic import Quadratic

from umbel.core import registry
from umbel.core.payloads import Updates, pack, unpack
from umbel.core.run_file import resolve
from umbel.core.trees import Model, Tree, flatten, map_tree, unflatten, zeros_like
from umbel.server.records import Scores
from umbel.server.rounds import Start, rounds, step
from umbel.strategies.build import build_strategy
from umbel.strategies.parts import Combined, ServerState, Strategy

OPTIMUM = torch.tensor([1.0, -1.0, 2.0])
rows = pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)


def make(row: Row) -> Strategy:
    table = {"name": row.name, **row.parameters}
    base = {"data": {"name": "digits"}, "task": {"kind": "classification"}}
    strategy = build_strategy(resolve({**base, "strategy": table}).strategy)
    if strategy.root is not None:
        strategy = strategy._replace(combine=strategy.root.combine(at_the_server))
    return strategy


def at_the_server(number: int, model: Tree) -> Tree:
    """What a server with examples of its own trains: towards the optimum, or anywhere."""
    return {n: 0.3 * (OPTIMUM - t) if n == "w" else torch.ones_like(t) for n, t in model.items()}


def params() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {
        "weight": torch.randn(4, 3),
        "bias": torch.randn(4),
        "scale": torch.randn(2, dtype=torch.float64),
        "half": torch.randn(3, dtype=torch.bfloat16),
    }


def expected(strategy: Strategy) -> Tree:
    """The names, shapes and dtypes of a delta, and of what is sent besides."""
    travelling = strategy.travelling(Model(params(), {})).params
    return {**travelling, **strategy.upload_template(travelling)}


def updates(strategy: Strategy, seed: int, clients: int = 5) -> Updates:
    generator = torch.Generator().manual_seed(seed)
    delta = map_tree(
        lambda p: torch.randn(clients, *p.shape, generator=generator).to(p.dtype),
        expected(strategy),
    )
    if row_uploads := [n for n in delta if "/" in n]:
        # What is sent besides may be a figure that is never negative.
        delta |= {n: delta[n].abs() for n in row_uploads}
    weights = torch.randint(1, 50, (clients,), generator=generator).double()
    return Updates(1, [f"c{k}" for k in range(clients)], delta, weights)


def combine(strategy: Strategy, update: Updates) -> Combined:
    combiner = strategy.combine
    return combiner.finish(combiner.add(combiner.zero(expected(strategy)), update))


def serve(
    strategy: Strategy, start: Tree, state: ServerState, combined: Combined
) -> tuple[Tree, ServerState]:
    """The server's step, as the round loop has it made."""
    told = combined._replace(population=8, share=0.6)
    stepped, after = step(strategy, Model(start, {}), state, told)
    return stepped.params, after


def same(left: Tree, right: Tree) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def test_every_strategy_has_a_row() -> None:
    assert {row.name for row in TABLE} == set(registry.known("strategies"))


@rows
def test_zero_delta_from_a_fresh_state_is_a_fixed_point(row: Row) -> None:
    strategy, start = make(row), params()
    update = updates(strategy, 0)
    zero = Updates(1, update.clients, zeros_like(update.delta), update.weights)
    stepped, _ = serve(strategy, start, strategy.init(start), combine(strategy, zero))
    assert same(stepped, start)


@rows
def test_names_shapes_and_dtypes_are_kept(row: Row) -> None:
    strategy, start = make(row), params()
    stepped, state = serve(
        strategy, start, strategy.init(start), combine(strategy, updates(strategy, 0))
    )
    for tree, like in [(stepped, start), (flatten(state), flatten(strategy.init(start)))]:
        assert {n: (t.shape, t.dtype) for n, t in tree.items()} == {
            n: (t.shape, t.dtype) for n, t in like.items()
        }
    assert not same(stepped, start)


@rows
def test_server_step_is_pure(row: Row) -> None:
    strategy, start = make(row), params()
    state, combined = strategy.init(start), combine(strategy, updates(strategy, 0))
    once = serve(strategy, start, state, combined)
    again = serve(strategy, start, state, combined)
    assert same(once[0], again[0])
    assert same(flatten(once[1]), flatten(again[1]))
    assert same(start, params())
    assert same(flatten(state), flatten(strategy.init(params())))


@rows
def test_state_goes_through_disk_bit_for_bit(row: Row) -> None:
    strategy, start = make(row), params()
    stepped, state = serve(
        strategy, start, strategy.init(start), combine(strategy, updates(strategy, 0))
    )
    tensors, _ = unpack(pack(flatten(state)))
    combined = combine(strategy, updates(strategy, 1))
    kept = serve(strategy, stepped, state, combined)[0]
    restored = serve(strategy, stepped, unflatten(tensors), combined)[0]
    assert same(kept, restored)


@rows
def test_order_and_grouping_of_clients_do_not_matter(row: Row) -> None:
    strategy, start = make(row), params()
    update = updates(strategy, 0)
    combiner = strategy.combine
    whole = combine(strategy, update)
    backwards = combiner.zero(expected(strategy))
    for k in (4, 3, 1, 0, 2):
        backwards = combiner.add(backwards, update.take([k]))
    others = [combiner.finish(backwards)]
    if combiner.merge is not None:
        left = combiner.add(combiner.zero(expected(strategy)), update.take([0, 1]))
        right = combiner.add(combiner.zero(expected(strategy)), update.take([2, 3, 4]))
        others.append(combiner.finish(combiner.merge(left, right)))
    stepped, _ = serve(strategy, start, strategy.init(start), whole)
    for other in others:
        assert other.clients == whole.clients
        turned, _ = serve(strategy, start, strategy.init(start), other)
        for name, tensor in stepped.items():
            torch.testing.assert_close(turned[name], tensor)


@rows
def test_grouping_into_stacks_is_bit_for_bit_the_same(row: Row) -> None:
    strategy = make(row)
    update = updates(strategy, 0)
    combiner = strategy.combine
    alone = combiner.zero(expected(strategy))
    for k in range(5):
        alone = combiner.add(alone, update.take([k]))
    assert same(combiner.finish(alone).delta, combine(strategy, update).delta)


@rows
def test_finds_the_optimum_of_a_quadratic(row: Row) -> None:
    strategy = make(row)
    optima = [{"w": torch.tensor([float(k), -1.0, 2.0 * k])} for k in range(4)]
    if row.agreed:
        optima = [{"w": OPTIMUM}] * 4
    sizes = [10, 20, 30, 40]
    run = resolve(
        {
            "run": {"rounds": 150},
            "data": {"name": "digits"},
            "task": {"kind": "classification"},
            "strategy": {"name": row.name, **row.parameters},
        }
    )
    federation = Quadratic(optima, sizes, strategy.client, lr=0.2, steps=3)
    model = Model({"w": torch.zeros(3)}, {})
    start = Start(0, model, strategy.init(model.params))
    results = list(rounds(run, strategy, federation, start, lambda r, m: Scores({}, {})))
    # All clients take the same number of equal steps on equal curvatures, so FedAvg's fixed point
    # is the weighted mean of the optima (no client drift).
    expected = sum(s * o["w"] for s, o in zip(sizes, optima, strict=True)) / sum(sizes)
    found = results[-1].model.params["w"]
    if row.adapts:
        found = found - results[-1].state["alpha"]["w"] * (found - expected)
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0)
