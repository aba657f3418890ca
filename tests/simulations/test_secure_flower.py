"""Secure aggregation in Flower's own simulation: the model of the engine in process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from umbel.core.run_file import RunFile, resolve
from umbel.simulations.simulate import simulate

pytestmark = [pytest.mark.flower, pytest.mark.slow]


def run_file(store: Path) -> RunFile:
    table: dict[str, Any] = {
        "run": {"rounds": 2, "store": str(store), "seed": 5},
        "data": {
            "name": "breast-cancer",
            "split": {"kind": "iid", "clients": 4},
            "client_holdout": 0.2,
        },
        "task": {"kind": "classification", "model": "logistic"},
        "client": {"device": "cpu", "local_steps": 2},
        "strategy": {"name": "scaffold", "weights": "uniform", "cohort": 3},
        "secure_aggregation": {"enabled": True},
    }
    return resolve(table)


def test_variates_and_deltas_go_under_the_mask(tmp_path: Path) -> None:
    flower = simulate(run_file(tmp_path / "flower"), engine="flower")
    plain = simulate(run_file(tmp_path / "plain"), engine="sequential")
    assert flower.status == plain.status == "finished"
    assert flower.model is not None
    assert plain.model is not None
    left = safetensors.torch.load_file(flower.model)
    right = safetensors.torch.load_file(plain.model)
    for name, tensor in right.items():
        torch.testing.assert_close(left[name], tensor, rtol=0, atol=1e-4)
    assert flower.per_client == {}
    for ours, theirs in zip(flower.history, plain.history, strict=True):
        assert sorted(ours.participants) == sorted(theirs.participants)
        assert ours.training == pytest.approx(theirs.training, abs=1e-3)
        assert not ours.failures
