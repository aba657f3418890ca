"""FedCurv: its sums, and where it becomes FedAvg."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from umbel.core.run_file import resolve
from umbel.simulations.simulate import simulate
from umbel.strategies.fedcurv import fedcurv
from umbel.strategies.parts import Combined, Ended, Local


def run(store: Path, strategy: dict[str, Any], clients: int = 3, plan: str = "") -> Any:
    table = {
        "run": {"rounds": 3, "seed": 3, "store": str(store), "processes": 0},
        "data": {"name": "breast-cancer", "split": {"kind": "iid", "clients": clients}},
        "task": {"kind": "classification", "model": {"name": "mlp", "hidden": [6]}},
        "client": {"device": "cpu"},
        "strategy": {"weights": "uniform", **strategy},
        "evaluate": {"every": 0},
    }
    if plan:
        table["run"]["engine_plan"] = plan
    said: list[str] = []
    engine = "vectorised" if plan else "sequential"
    outcome = simulate(resolve(table), engine=engine, announce=said.append)
    assert not said
    assert not any(record.failures for record in outcome.history)
    assert outcome.model is not None
    return safetensors.torch.load_file(outcome.model)


def same(left: dict[str, Tensor], right: dict[str, Tensor], tolerance: float) -> bool:
    return all(torch.allclose(left[n], right[n], rtol=0, atol=tolerance) for n in left)


def test_without_strength_or_without_others_it_is_fedavg(tmp_path: Path) -> None:
    plain = run(tmp_path, {"name": "fedavg"})
    assert same(run(tmp_path, {"name": "fedcurv", "strength": 0.0}), plain, 0.0)
    assert not same(run(tmp_path, {"name": "fedcurv", "strength": 10.0}), plain, 1e-4)
    alone = run(tmp_path, {"name": "fedcurv", "strength": 10.0}, clients=1)
    assert same(alone, run(tmp_path, {"name": "fedavg"}, clients=1), 1e-5)


@pytest.mark.parametrize("plan", ["lean", "vmap"])
def test_kernels_agree(tmp_path: Path, plan: str) -> None:
    section = {"name": "fedcurv", "strength": 10.0}
    assert same(run(tmp_path, section), run(tmp_path, section, plan=plan), 1e-5)


def test_the_penalty_is_that_of_the_others() -> None:
    strategy = fedcurv(strength=0.5)
    params = {"w": torch.tensor([0.3, -1.0])}
    fishers = torch.tensor([[1.0, 2.0], [0.5, 0.25], [4.0, 0.0]])
    ends = torch.tensor([[0.0, 1.0], [1.0, -1.0], [2.0, 2.0]])
    state = strategy.init(params)
    sent = []
    for fisher, end in zip(fishers, ends, strict=True):
        assert strategy.client.end is not None
        own = {"fisher": {"w": torch.zeros(2)}, "pull": {"w": torch.zeros(2)}}
        own["squares"] = {"w": 3 * fisher}
        one = torch.tensor(1.0)
        ended = Ended({"w": end}, params, {}, own, 3 * one, 0.1, one, one)
        sent.append(strategy.client.end(ended))
    extra = {
        letter: {"w": torch.stack([d.uploads[letter]["w"] for d in sent]).double().mean(0)}
        for letter in ("fisher", "pull")
    }
    zero = {"w": torch.zeros(2, dtype=torch.float64)}
    _, state = strategy.server(params, state, Combined(zero, 3.0, 3, extra, 3, 1.0))
    assert strategy.broadcast is not None
    shared = strategy.broadcast(params, state)
    (term,) = strategy.client.loss_terms

    def penalty(w: Tensor) -> Tensor:
        return term(Local({"w": w, "squares/w": w}, params, shared, sent[0].own))

    for w in (torch.tensor([0.3, -1.0]), torch.tensor([5.0, 0.0])):
        wanted = 0.5 * (fishers[1:] * (w - ends[1:]) ** 2).sum()
        nought = 0.5 * (fishers[1:] * ends[1:] ** 2).sum()
        torch.testing.assert_close(penalty(w) - penalty(torch.zeros(2)), wanted - nought)
