"""Meta-learning rules against their formulas, their limits, and each other on both engines."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import vmap

from umbel.core.run_file import RunFile, resolve
from umbel.core.trees import Model, Tree
from umbel.server.records import Scores
from umbel.server.rounds import Start, rounds
from umbel.simulations.engines.sequential import sequential
from umbel.simulations.engines.vectorised import vectorised
from umbel.simulations.prepare import prepare
from umbel.strategies.fomaml import fomaml
from umbel.strategies.maml import maml
from umbel.strategies.parts import Local, Strategy
from umbel.strategies.parts.meta import deal
from umbel.strategies.per_fedavg import per_fedavg

torch.manual_seed(0)
A = torch.randn(6, 3, dtype=torch.float64)
B = torch.randn(6, dtype=torch.float64)


class Cubic:
    """Example i costs ``(a_i w - b_i)^2 / 2 + (a_i w)^3 / 6``: its Hessian depends on w."""

    def losses(self, params: Tree, batch: Tree) -> Tensor:
        at = batch["a"] @ params["w"]
        return 0.5 * (at - batch["b"]).square() + at**3 / 6

    def outputs(self, params: Tree, batch: Tree) -> Tensor:
        return batch["a"] @ params["w"]

    features = outputs


def gradient_of(strategy: Strategy, w: Tensor, mask: Tensor | None = None) -> Tensor:
    assert strategy.client.objective is not None
    leaf = w.clone().requires_grad_()
    local = Local({"w": leaf}, {"w": w})
    value = strategy.client.objective(Cubic(), local, {"a": A, "b": B}, mask)
    (found,) = torch.autograd.grad(value, leaf)
    return found


def g(w: Tensor, part: slice) -> Tensor:
    at = A[part] @ w
    return A[part].T @ (at - B[part] + at.square() / 2) / len(at)


def hessian(w: Tensor, part: slice) -> Tensor:
    at = A[part] @ w
    return A[part].T @ ((1 + at)[:, None] * A[part]) / len(at)


W = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64)
FRONT, BACK = slice(0, 3), slice(3, 6)


def test_maml_is_its_formula_by_hand_with_two_inner_steps() -> None:
    first = W - 0.1 * g(W, FRONT)
    second = first - 0.1 * g(first, FRONT)
    eye = torch.eye(3, dtype=torch.float64)
    by_hand = (
        (eye - 0.1 * hessian(W, FRONT)) @ (eye - 0.1 * hessian(first, FRONT)) @ g(second, BACK)
    )
    torch.testing.assert_close(gradient_of(maml(inner_lr=0.1, inner_steps=2), W), by_hand)
    torch.testing.assert_close(gradient_of(fomaml(inner_lr=0.1, inner_steps=2), W), g(second, BACK))


def test_per_fedavg_is_equations_9_and_10() -> None:
    d, dd, ddd = slice(0, 2), slice(2, 4), slice(4, 6)
    towards = g(W - 0.1 * g(W, d), dd)
    torch.testing.assert_close(gradient_of(per_fedavg(inner_lr=0.1, hessian="none"), W), towards)
    exact = towards - 0.1 * hessian(W, ddd) @ towards
    found = gradient_of(per_fedavg(inner_lr=0.1, step=1e-4), W)
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("make", [maml, fomaml])
def test_without_an_inner_rate_the_query_loss_is_minimised(make: Any) -> None:
    torch.testing.assert_close(gradient_of(make(inner_lr=0.0), W), g(W, BACK))
    torch.testing.assert_close(gradient_of(make(inner_lr=0.0, support=1.0), W), g(W, slice(0, 6)))


@pytest.mark.parametrize("shares", [[0.5], [1 / 3, 1 / 3], [0.2, 0.3], [1.0]])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_a_padded_batch_is_dealt_as_the_same_one_alone(shares: list[float], count: int) -> None:
    whole = {"x": torch.arange(8.0)}
    mask = torch.arange(8) < count
    alone = deal({"x": whole["x"][:count]}, None, shares)
    for mine, padded in zip(alone, deal(whole, mask, shares), strict=True):
        assert mine.mask is None
        assert padded.mask is not None
        assert torch.equal(padded.batch["x"][padded.mask], mine.batch["x"])
        assert len(mine.batch["x"])
    together = vmap(lambda m: [s.mask for s in deal(whole, m, shares)])(mask[None])
    for mine, padded in zip(deal(whole, mask, shares), together, strict=True):
        assert torch.equal(mine.mask, padded[0])


def run_file(name: str, rounds: int = 2, **parameters: Any) -> RunFile:
    return resolve(
        {
            "run": {"rounds": rounds, "seed": 3},
            "data": {
                "name": "digits",
                "split": {"kind": "dirichlet", "clients": 6, "alpha": 0.4},
            },
            "task": {"kind": "classification", "model": {"name": "mlp", "hidden": [8]}},
            "client": {"lr": 0.2, "batch_size": 100, "device": "cpu"},
            "strategy": {"name": name, **parameters},
        }
    )


def final(engine: Any, run: RunFile) -> Model:
    prepared = prepare(run)
    federation = engine(run, prepared.data, prepared.task, prepared.strategy.client)
    model = prepared.model()
    start = Start(0, model, prepared.strategy.init(model.params))
    try:
        results = list(
            rounds(run, prepared.strategy, federation, start, lambda r, m: Scores({}, {}))
        )
    finally:
        federation.close()
    return results[-1].model


def close(left: Model, right: Model) -> None:
    for name, tensor in left.params.items():
        torch.testing.assert_close(right.params[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["maml", "fomaml", "meta_sgd", "per_fedavg", "reptile"])
def test_both_engines_agree_on_ragged_clients(name: str) -> None:
    run = run_file(name)
    close(final(sequential, run), final(vectorised, run))


def test_reptile_with_the_whole_step_is_fedavg() -> None:
    close(
        final(sequential, run_file("fedavg")), final(sequential, run_file("reptile", server_lr=1.0))
    )


def test_meta_sgd_begins_as_maml_and_learns_its_rates() -> None:
    one_step = {"client": {"lr": 0.2, "batch_size": 13, "local_steps": 1, "device": "cpu"}}

    def once(name: str, rounds: int) -> Model:
        table = run_file(name, rounds, inner_lr=0.1).model_dump(mode="json")
        table["client"] = one_step["client"]
        return final(sequential, resolve(table))

    close(once("maml", 1), once("meta_sgd", 1))
    apart = [
        (once("maml", 4).params[name] - tensor).abs().max()
        for name, tensor in once("meta_sgd", 4).params.items()
    ]
    assert max(apart) > 1e-4
