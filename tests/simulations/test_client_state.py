"""Strategies whose clients keep state: the same on every engine, kernel and number of workers."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from umbel.core.run_file import RunFile, resolve
from umbel.simulations.simulate import Outcome, simulate

NUMBER = itertools.count()


def table(folder: Path, strategy: dict[str, Any], **tables: Any) -> RunFile:
    return resolve(
        {
            "run": {
                "rounds": 4,
                "seed": 3,
                "store": str(folder / str(next(NUMBER))),
                "processes": 0,
                **tables.pop("run", {}),
            },
            "data": {
                "name": "digits",
                "split": {"kind": "dirichlet", "clients": 6, "alpha": 0.5, "minimum": 5},
                **tables.pop("data", {}),
            },
            "task": {
                "kind": "classification",
                "model": tables.pop("model", {"name": "mlp", "hidden": [8]}),
            },
            "client": {"lr": 0.1, "local_epochs": 2, "device": "cpu", **tables.pop("client", {})},
            "strategy": {"cohort": 3, **strategy},
            **tables,
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


KERNELS = {"scaffold": ("lean", "stacked", "vmap")}


@pytest.mark.parametrize("strategy", KERNELS)
def test_kernels_agree_with_one_client_after_another(strategy: str, tmp_path: Path) -> None:
    expected = simulate(table(tmp_path, {"name": strategy}), engine="sequential")
    for kernel in KERNELS[strategy]:
        run = table(tmp_path, {"name": strategy}, run={"engine_plan": kernel})
        assert_close(expected, simulate(run))


@pytest.mark.slow
def test_workers_end_with_the_same_bits(tmp_path: Path) -> None:
    plan = {"engine_plan": "stacked:chunk=1"}
    found = []
    for processes in (0, 1, 2):
        run = table(tmp_path, {"name": "scaffold"}, run={**plan, "processes": processes})
        found.append(tensors(simulate(run)))
    for other in found[1:]:
        assert all(torch.equal(other[name], tensor) for name, tensor in found[0].items())
