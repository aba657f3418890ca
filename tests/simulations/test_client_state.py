"""Strategies whose clients keep state: the same on every engine, kernel and number of workers."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from umbel.core.errors import InputError
from umbel.core.run_file import RunFile, resolve
from umbel.simulations.simulate import Outcome, simulate

NUMBER = itertools.count()

NORMED = """
from torch import nn

def normed():
    return nn.Sequential(nn.Linear(30, 5), nn.BatchNorm1d(5), nn.Linear(5, 1))
"""


def table(folder: Path, strategy: dict[str, Any], **tables: Any) -> RunFile:
    return resolve(
        {
            "run": {
                "rounds": 3,
                "seed": 3,
                "store": str(folder / str(next(NUMBER))),
                "processes": 0,
                **tables.pop("run", {}),
            },
            "data": {
                "name": "breast-cancer",
                "split": {"kind": "dirichlet", "clients": 4, "alpha": 0.5, "minimum": 12},
                "client_holdout": 0.25,
            },
            "task": {
                "kind": "classification",
                "model": tables.pop("model", {"name": "mlp", "hidden": [6]}),
            },
            "client": {"lr": 0.1, "device": "cpu", **tables.pop("client", {})},
            "strategy": {"cohort": 3, **strategy},
            "evaluate": {"every": 0, **tables.pop("evaluate", {})},
        }
    )


def tensors(outcome: Outcome) -> dict[str, torch.Tensor]:
    assert outcome.model is not None
    return load_file(outcome.model)


def assert_close(left: Outcome, right: Outcome, tolerance: float = 1e-5) -> None:
    assert not any(r.failures for o in (left, right) for r in o.history)
    for name, tensor in tensors(left).items():
        torch.testing.assert_close(
            tensors(right)[name], tensor, rtol=tolerance, atol=tolerance, msg=name
        )
    for name, value in left.metrics.items():
        assert right.metrics[name] == pytest.approx(value, rel=1e-3, abs=1e-3), name


CASES: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"name": "scaffold"}, ("lean", "stacked", "vmap")),
    ({"name": "feddyn"}, ("stacked", "vmap")),
    ({"name": "fednova", "mu": 0.1}, ("stacked",)),
    ({"name": "qfedavg"}, ("lean", "stacked")),
    ({"name": "fedper"}, ("lean", "stacked", "vmap")),
    ({"name": "fedrep"}, ("lean", "stacked", "vmap")),
    ({"name": "lgfedavg"}, ("stacked",)),
    ({"name": "moon"}, ("lean", "vmap")),
    ({"name": "ditto"}, ("lean", "vmap")),
    ({"name": "apfl"}, ("lean", "vmap")),
    ({"name": "pfedme", "lam": 2.0, "inner_lr": 0.1, "inner_steps": 2}, ("lean", "vmap")),
]


@pytest.mark.parametrize(("strategy", "kernels"), CASES, ids=lambda case: str(case))
def test_kernels_agree_with_one_client_after_another(
    strategy: dict[str, Any], kernels: tuple[str, ...], tmp_path: Path
) -> None:
    expected = simulate(table(tmp_path, strategy), engine="sequential")
    for kernel in kernels:
        said: list[str] = []
        run = table(tmp_path, strategy, run={"engine_plan": kernel})
        assert_close(expected, simulate(run, announce=said.append))
        assert not said


def test_batch_normalisation_is_each_clients_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "normed_model.py").write_text(NORMED)
    monkeypatch.syspath_prepend(str(tmp_path))
    model = "normed_model:normed"
    expected = simulate(table(tmp_path, {"name": "fedbn"}, model=model), engine="sequential")
    found = simulate(table(tmp_path, {"name": "fedbn"}, model=model))
    assert_close(expected, found)
    learned = tensors(expected)
    assert torch.equal(learned["1.running_mean"], torch.zeros(5))
    assert torch.equal(learned["1.weight"], torch.ones(5))
    assert not torch.equal(learned["2.bias"], torch.zeros(1))
    assert expected.metrics["personal_loss"] != expected.metrics["loss"]


def test_a_strategy_that_finds_nothing_private_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="finds nothing in the model to keep private"):
        simulate(table(tmp_path, {"name": "fedbn"}))
    with pytest.raises(InputError, match="keeps all 4 parameters private"):
        simulate(table(tmp_path, {"name": "fedper", "head": 2}))


@pytest.mark.parametrize(
    ("name", "client"),
    [
        ("scaffold", {"momentum": 0.5}),
        ("scaffold", {"optimizer": "adam"}),
        ("fednova", {"optimizer": "adamw"}),
    ],
)
def test_an_optimizer_that_the_mathematics_excludes_is_refused(
    name: str, client: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="assumes"):
        simulate(table(tmp_path, {"name": name}, client=client))


def test_personal_figures_are_of_each_client_and_their_spread(tmp_path: Path) -> None:
    outcome = simulate(table(tmp_path, {"name": "fedper"}, evaluate={"fine_tune_steps": 3}))
    each = list(outcome.per_client.values())
    assert len(each) == 4
    for prefix in ("personal_", "fine_tuned_"):
        accuracy = [m[f"{prefix}accuracy"] for m in each]
        losses = [m[f"{prefix}loss"] for m in each]
        assert outcome.metrics[f"{prefix}accuracy"] == pytest.approx(np.mean(accuracy))
        assert outcome.metrics[f"{prefix}accuracy_worst"] == min(accuracy)
        assert outcome.metrics[f"{prefix}loss_worst"] == max(losses)
        tenth = np.percentile(accuracy, 10)
        assert outcome.metrics[f"{prefix}accuracy_p10"] == pytest.approx(tenth)


def test_fine_tuning_is_never_fed_back(tmp_path: Path) -> None:
    plain = simulate(table(tmp_path, {"name": "fedavg"}))
    tuned = simulate(table(tmp_path, {"name": "fedavg"}, evaluate={"fine_tune_steps": 3}))
    assert all(torch.equal(tensors(tuned)[n], t) for n, t in tensors(plain).items())
    assert tuned.metrics["fine_tuned_loss"] < tuned.metrics["loss"]
    assert {n: v for n, v in tuned.metrics.items() if "tuned" not in n} == plain.metrics


@pytest.mark.slow
def test_workers_end_with_the_same_bits(tmp_path: Path) -> None:
    plan = {"engine_plan": "stacked:chunk=1"}
    found = []
    for processes in (0, 1, 2):
        run = table(tmp_path, {"name": "scaffold"}, run={**plan, "processes": processes})
        found.append(tensors(simulate(run)))
    for other in found[1:]:
        assert all(torch.equal(other[name], tensor) for name, tensor in found[0].items())
