from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from umbel.core import run_file
from umbel.core.errors import InputError
from umbel.core.run_file import RunFile
from umbel.server.store import RunStore
from umbel.simulations.simulate import simulate
from umbel.tasks.collect import Columns, Moment, collected
from umbel.tasks.task import Batch, Forward, Task


def shifted(info: Any, model: Any, *, twice: bool = False, apart: bool = False) -> Task:
    """Learns the mean of what the client holds, from noisy copies that it makes with the model."""

    def collect(module: nn.Module, held: Columns, moment: Moment) -> Columns:
        noise = torch.randn(len(held["x"]), 1).numpy() / (1 + moment.round)
        x = held["x"][:, :1]
        made = np.concatenate([x + noise, x - noise]) if twice or moment.seed % 2 else x + noise
        assert not module.training
        return {"x": np.ones((len(made), 1), np.float32), "y": made.astype(np.float32)}

    def losses(forward: Forward, batch: Batch) -> Tensor:
        return (forward(batch["x"]) - batch["y"]).square().sum(1)

    def held(forward: Forward, batch: Batch) -> Tensor:
        return (forward(torch.ones_like(batch["x"][:, :1])) - batch["x"][:, :1]).square().sum(1)

    def metrics(forward: Forward, batch: Batch) -> Mapping[str, Tensor]:
        return {}

    test = Task(lambda: nn.Linear(1, 1), held, metrics)
    return Task(
        lambda: nn.Linear(1, 1),
        losses,
        metrics,
        test=test,
        collect=collect,
        collects_apart=apart,
    )


HERE = "tests_tasks_test_collect"


def run(store: Path, **more: Any) -> RunFile:
    table: dict[str, Any] = {
        "run": {
            "name": "made",
            "seed": 3,
            "rounds": 4,
            "processes": 0,
            "store": str(store),
            "engine_plan": "stacked",
        },
        "data": {"name": "diabetes", "split": {"kind": "iid", "clients": 5}, "holdout": 0.2},
        "task": {"kind": f"{HERE}:shifted", **more.pop("task", {})},
        "client": {"lr": 0.1, "batch_size": 16, **more.pop("client", {})},
    }
    return run_file.resolve({**table, **more})


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, HERE, sys.modules[__name__])


def test_nothing_made_is_an_error() -> None:
    with pytest.raises(InputError, match="columns of lengths"):
        collected(lambda *_: {"x": np.zeros(0)}, nn.Linear(1, 1), {}, 0, 1, 1, "c0")
    with pytest.raises(InputError, match="columns of lengths"):
        collected(
            lambda *_: {"x": np.zeros(2), "y": np.zeros(3)}, nn.Linear(1, 1), {}, 0, 1, 1, "c0"
        )


def test_a_moment_is_of_its_round_and_client() -> None:
    seen: list[Moment] = []

    def collect(module: nn.Module, held: Columns, moment: Moment) -> Columns:
        seen.append(moment)
        return {"x": torch.rand(1).numpy()}

    module, before = nn.Linear(1, 1), torch.get_rng_state()
    made = [
        collected(collect, module, {}, 0, number, 9, client)["x"][0]
        for number, client in ((1, "a"), (2, "a"), (1, "b"), (1, "a"))
    ]
    assert torch.equal(before, torch.get_rng_state())
    assert made[0] == made[3]
    assert len(set(made)) == 3, made
    assert seen[1][1:] == (2, 9, {})


def test_engines_make_the_same_examples_and_train_alike(tmp_path: Path) -> None:
    found = {}
    for engine in ("sequential", "vectorised"):
        path = tmp_path / engine
        report = simulate(run(path), engine=engine)
        latest = RunStore(path).latest(report.run_id)
        assert latest is not None
        found[engine] = latest.model.params
    for name, tensor in found["sequential"].items():
        torch.testing.assert_close(tensor, found["vectorised"][name], rtol=1e-5, atol=1e-6)


def test_example_privacy_needs_one_example_from_each(tmp_path: Path) -> None:
    privacy = {"unit": "example", "clip_norm": 1.0, "noise_multiplier": 1.0, "delta": 1e-5}
    with pytest.raises(InputError, match="in all of them"):
        simulate(run(tmp_path, privacy=privacy), engine="sequential")
    with pytest.raises(InputError, match="declares one from each"):
        simulate(
            run(tmp_path, privacy=privacy, task={"apart": True, "twice": True}), engine="sequential"
        )
    report = simulate(
        run(tmp_path, privacy={**privacy, "unit": "client"}, strategy={"weights": "uniform"}),
        engine="sequential",
    )
    assert report.status == "finished"
