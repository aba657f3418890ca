"""Rules for low-rank adapters: which of them are exact, and by how much the others are not."""

from __future__ import annotations

import pytest
import torch

from umbel.core.errors import InputError
from umbel.core.payloads import Updates
from umbel.core.run_file import Strategy as Section
from umbel.core.trees import Model, Tree, zeros_like
from umbel.server.rounds import observed, step
from umbel.strategies.build import build_strategy
from umbel.strategies.parts import Strategy
from umbel.strategies.parts.low_rank import RESIDUAL, A, B

LAYER = "model.layers.0.q_proj."
RANKS = [4, 2, 1]


def model(b_at_zero: bool = False) -> Model:
    draw = torch.Generator().manual_seed(0)
    params = {
        LAYER + A: torch.randn(4, 6, generator=draw),
        LAYER + B: torch.randn(5, 4, generator=draw) * (not b_at_zero),
        "score.weight": torch.randn(3, 6, generator=draw),
    }
    return Model(params, {LAYER + RESIDUAL: torch.randn(5, 6, generator=draw)})


def updates(start: Model, same_a: bool = False) -> Updates:
    """Three clients, of which those with a smaller rank move only so many rows and columns."""
    draw = torch.Generator().manual_seed(1)
    delta = {n: torch.randn(3, *t.shape, generator=draw) for n, t in start.params.items()}
    delta |= {n: torch.zeros(3, *t.shape) for n, t in start.buffers.items()}
    for row, rank in enumerate(RANKS):
        delta[LAYER + A][row, rank:] = 0
        delta[LAYER + B][row, :, rank:] = 0
    if same_a:
        delta[LAYER + A] = torch.zeros_like(delta[LAYER + A])
    return Updates(1, ["a", "b", "c"], delta, torch.tensor([1.0, 5.0, 2.0], dtype=torch.float64))


def effective(tensors: Tree) -> torch.Tensor:
    """What the adapter and its residual add to the layer, but for the common scale."""
    return tensors[LAYER + RESIDUAL].double() + (
        tensors[LAYER + B].double() @ tensors[LAYER + A].double()
    )


def exact(start: Model, given: Updates) -> torch.Tensor:
    """The mean of what the clients' own models add."""
    total = torch.zeros(5, 6, dtype=torch.float64)
    for row, weight in enumerate(given.weights.tolist()):
        local = {n: t.double() + given.delta[n][row].double() for n, t in start.tensors().items()}
        total += weight * effective(local)
    return total / float(given.weights.sum())


def make(name: str) -> Strategy:
    return build_strategy(Section.model_validate({"name": name}))


def stepped(name: str, start: Model, given: Updates) -> tuple[Model, dict[str, list[float]]]:
    strategy = make(name)
    combiner = strategy.combine
    combined = combiner.finish(combiner.add(combiner.zero(start.tensors()), given))
    after, _ = step(strategy, start, strategy.init(start.params), combined)
    return after, observed(strategy, start, combined)


def off(name: str, start: Model, given: Updates) -> float:
    """How far the new model is from the exact mean, relative to how far it had to go."""
    truth = exact(start, given)
    found = effective(stepped(name, start, given)[0].tensors())
    return float((found - truth).norm() / (truth - effective(start.tensors())).norm())


@pytest.mark.parametrize("name", ["fedex-lora", "flora"])
@pytest.mark.parametrize("b_at_zero", [True, False])
def test_exact_rules_move_the_model_by_the_mean_of_products(name: str, b_at_zero: bool) -> None:
    start = model(b_at_zero)
    assert off(name, start, updates(start)) < 1e-6


def test_one_a_for_all_is_exact_and_plain_averaging_is_not() -> None:
    start = model()
    assert off("fedavg", start, updates(start, same_a=True)) < 1e-6
    assert off("fedit", start, updates(start)) > 0.1
    assert off("fedavg", start, updates(start)) == off("fedit", start, updates(start))


def test_the_recorded_error_is_what_averaging_loses() -> None:
    start = model()
    given = updates(start)
    truth = exact(start, given) - start.buffers[LAYER + RESIDUAL].double()
    after, figures = stepped("fedit", start, given)
    plain = after.params[LAYER + B].double() @ after.params[LAYER + A].double()
    expected = float((truth - plain).norm() / truth.norm())
    assert figures["aggregation_error"] == [pytest.approx(expected, rel=1e-5), 1.0]
    same = stepped("fedit", start, updates(start, same_a=True))[1]
    assert same["aggregation_error"][0] < 1e-9


def test_flexlora_is_the_best_of_its_rank() -> None:
    start = model()
    given = updates(start)
    truth = exact(start, given) - start.buffers[LAYER + RESIDUAL].double()
    after = stepped("flexlora", start, given)[0].params
    found = after[LAYER + B].double() @ after[LAYER + A].double()
    rest = torch.linalg.svdvals(truth)[4:]
    assert float((truth - found).norm()) == pytest.approx(float(rest.norm()), rel=1e-4)


def test_flora_begins_anew() -> None:
    start = model()
    after = stepped("flora", start, updates(start))[0].params
    assert not after[LAYER + B].any()
    assert after[LAYER + A].abs().max() <= 6**-0.5
    assert not torch.equal(after[LAYER + A], start.params[LAYER + A])


@pytest.mark.parametrize("name", ["fedex-lora", "flora"])
def test_exact_rules_say_what_they_need(name: str) -> None:
    start = model()
    bare = Model(start.params, {})
    given = updates(start)
    given.delta.pop(LAYER + RESIDUAL)  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="residual = true"):
        stepped(name, bare, given)


def test_ffa_lora_refuses_an_a_that_is_trained() -> None:
    strategy = make("ffa-lora")
    with pytest.raises(InputError, match="freeze_a = true"):
        strategy.init(model().params)
    assert strategy.init({LAYER + B: torch.zeros(5, 4)}) == {}


def test_rolora_holds_one_factor_in_turns() -> None:
    from umbel.strategies.parts import Local

    strategy = make("rolora")
    params = model().params
    state = strategy.init(params)
    assert strategy.broadcast is not None
    assert strategy.client.after is not None
    combined = strategy.combine.finish(
        strategy.combine.add(strategy.combine.zero(params), updates(Model(params, {})))
    )
    for held in (A, B, A):
        local = Local(params, params, strategy.broadcast(params, state))
        gradient = strategy.client.gradient(
            {n: torch.ones_like(p) for n, p in params.items()}, local
        )
        assert {n for n, g in gradient.items() if not g.any()} == {LAYER + held}
        decayed = {n: 0.9 * p for n, p in params.items()}
        kept = strategy.client.after(decayed, gradient, local)
        assert [n for n in params if torch.equal(kept[n], params[n])] == [LAYER + held]
        params, state = strategy.server(params, state, combined)


def test_fedsa_keeps_b_at_the_clients() -> None:
    travelling = make("fedsa-lora").travelling(model())
    assert LAYER + B not in travelling.params
    assert {LAYER + A, "score.weight"} <= travelling.params.keys()


def test_products_are_sums_in_any_grouping() -> None:
    start = model()
    given = updates(start)
    combiner = make("fedit").combine
    assert combiner.merge is not None
    whole = combiner.finish(combiner.add(combiner.zero(start.tensors()), given)).delta
    parts = combiner.merge(
        combiner.add(combiner.zero(start.tensors()), given.take([0])),
        combiner.add(combiner.zero(start.tensors()), given.take([1, 2])),
    )
    for name, tensor in combiner.finish(parts).delta.items():
        torch.testing.assert_close(tensor, whole[name])
    still = Updates(1, given.clients, zeros_like(given.delta), given.weights)
    assert not combiner.add(combiner.zero(start.tensors()), still).delta[f"products/{LAYER}"].any()
