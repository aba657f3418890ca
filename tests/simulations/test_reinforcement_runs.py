from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from umbel.core.errors import InputError
from umbel.core.run_file import RunFile, resolve
from umbel.core.trees import Tree
from umbel.server.records import RoundRecord
from umbel.server.store import RunStore
from umbel.simulations.simulate import Outcome, simulate

MLP = {"name": "mlp", "hidden": [8]}
PPO = {"kind": "ppo-control", "steps": 12, "copies": 4, "model": MLP}
REINFORCE = {"kind": "reinforce", "copies": 4, "model": MLP}


def run(store: Path, task: dict[str, Any], rounds: int = 1, **more: Any) -> RunFile:
    return resolve(
        {
            "run": {
                "seed": 2,
                "rounds": rounds,
                "processes": 0,
                "store": str(store),
                "engine_plan": "lean",
            },
            "data": {"name": "cartpoles", "clients": 3},
            "task": task,
            "client": {"lr": 0.05, "batch_size": 16, "local_epochs": 2},
            "strategy": {"cohort": 3},
            "evaluate": {"every": 0},
            **more,
        }
    )


def model(outcome: Outcome, store: Path) -> Tree:
    last = RunStore(store).latest(outcome.run_id)
    assert last is not None
    return last.model.params


# Of REINFORCE, clients make different numbers of examples.
@pytest.mark.parametrize("task", [PPO, REINFORCE], ids=["ppo", "reinforce"])
@pytest.mark.parametrize("strategy", [{}, {"name": "fedper", "head": 1}])
def test_engines_agree(tmp_path: Path, task: dict[str, Any], strategy: dict[str, Any]) -> None:
    found = {}
    for engine in ("sequential", "vectorised"):
        where = {"strategy": {"cohort": 3, **strategy}}
        made = run(tmp_path / engine, task, 2, **where)
        made = made.model_copy(update={"run": made.run.model_copy(update={"engine_plan": "vmap"})})
        said: list[str] = []
        outcome = simulate(made, engine=engine, announce=said.append)
        found[engine] = model(outcome, tmp_path / engine)
        assert said == []
    for name, tensor in found["sequential"].items():
        torch.testing.assert_close(tensor, found["vectorised"][name], rtol=1e-4, atol=1e-5)


def test_a_run_that_was_interrupted_ends_with_the_same_bits(tmp_path: Path) -> None:
    tuned = {"evaluate": {"every": 0, "fine_tune_steps": 1}}

    def stop(record: RoundRecord, planned: int) -> None:
        if record.round == 2:
            raise KeyboardInterrupt

    whole = model(simulate(run(tmp_path / "a", PPO, 4, **tuned)), tmp_path / "a")
    begun = simulate(run(tmp_path / "b", PPO, 4, **tuned), on_round=stop)
    assert (begun.status, begun.rounds) == ("interrupted", 2)
    ended = simulate(run(tmp_path / "b", PPO, 4, **tuned), resume=begun.run_id)
    assert {"return", "fine_tuned_return"} <= ended.metrics.keys()
    assert ended.metrics["return"] == -ended.metrics["loss"]
    again = model(ended, tmp_path / "b")
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_client_is_hidden_and_not_an_environment(tmp_path: Path) -> None:
    privacy = {"clip_norm": 1.0, "noise_multiplier": 0.1, "delta": 1e-5}
    with pytest.raises(InputError, match="use unit = 'client'"):
        simulate(run(tmp_path, PPO, privacy={**privacy, "unit": "example"}))
    uniform = {"cohort": 3, "weights": "uniform"}
    hidden = run(tmp_path, PPO, privacy={**privacy, "unit": "client"}, strategy=uniform)
    outcome = simulate(hidden)
    assert outcome.status == "finished"
    assert outcome.privacy is not None


def test_secure_aggregation_changes_nothing(tmp_path: Path) -> None:
    uniform = {"cohort": 3, "weights": "uniform"}
    plain = simulate(run(tmp_path / "a", PPO, strategy=uniform))
    hidden = {"strategy": uniform, "secure_aggregation": {"enabled": True}}
    secure = simulate(run(tmp_path / "b", PPO, **hidden))
    for name, tensor in model(plain, tmp_path / "a").items():
        other = model(secure, tmp_path / "b")[name]
        torch.testing.assert_close(tensor, other, rtol=1e-3, atol=1e-3)
