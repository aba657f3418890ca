"""What a task's clients keep of their examples: the same on every engine, over Flower, resumed."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.local_grid import LocalGrid

from umbel.client.flower.app import app as client_app
from umbel.client.state import ClientStates
from umbel.core.errors import InputError, RunError
from umbel.core.payloads import Federation
from umbel.core.run_file import RunFile, resolve
from umbel.core.trees import Tree
from umbel.server.flower.grid import GridFederation
from umbel.server.records import RoundRecord, Scores
from umbel.server.rounds import Start, rounds
from umbel.server.store import RunStore
from umbel.simulations.engines.sequential import sequential
from umbel.simulations.prepare import prepare
from umbel.simulations.simulate import Outcome, simulate

FRESH = 12 * 4
MEMORY = 100


def run(store: Path, total: int = 4, memory: int = MEMORY, **more: Any) -> RunFile:
    model = {"name": "mlp", "hidden": [8]}
    return resolve(
        {
            "run": {"seed": 2, "rounds": total, "processes": 0, "store": str(store)},
            "data": {"name": "cartpoles", "clients": 3},
            "task": {"kind": "dqn", "steps": 12, "copies": 4, "memory": memory, "model": model},
            "client": {"lr": 0.05, "batch_size": 16, "local_steps": 6, "device": "cpu"},
            "strategy": {"cohort": 3},
            "evaluate": {"every": 0},
            **more,
        }
    )


def learned(outcome: Outcome, store: Path) -> Tree:
    last = RunStore(store).latest(outcome.run_id)
    assert last is not None
    return last.model.params


def remembered(outcome: Outcome, store: Path, after: int, client: str = "pole000") -> Tree:
    [found] = states(outcome, store).get(after + 1, [client])
    assert found is not None
    return found


def states(outcome: Outcome, store: Path) -> ClientStates:
    return ClientStates(store / outcome.run_id / "clients.db", "fedavg on dqn")


# Two of three clients a round, so that memories differ in length; SCAFFOLD's variates beside them.
@pytest.mark.parametrize("kernel", ["lean", "vmap"])
@pytest.mark.parametrize("strategy", [{"name": "fedavg"}, {"name": "scaffold"}], ids=str)
def test_engines_agree(tmp_path: Path, strategy: dict[str, Any], kernel: str) -> None:
    found = {}
    for engine in ("sequential", "vectorised"):
        made = run(tmp_path / engine, strategy={"cohort": 2, **strategy})
        made = made.model_copy(update={"run": made.run.model_copy(update={"engine_plan": kernel})})
        said: list[str] = []
        found[engine] = learned(
            simulate(made, engine=engine, announce=said.append), tmp_path / engine
        )
        assert said == []
    for name, tensor in found["sequential"].items():
        torch.testing.assert_close(tensor, found["vectorised"][name], rtol=1e-4, atol=1e-5)


def test_a_client_trains_on_what_it_kept_and_no_more_of_it_than_it_may_keep(
    tmp_path: Path,
) -> None:
    outcome = simulate(run(tmp_path, 3), engine="sequential")
    kept = [remembered(outcome, tmp_path, after) for after in (2, 3)]
    assert [len(tree["examples/x"]) for tree in kept] == [2 * FRESH, MEMORY]
    assert "examples/target" not in kept[0]  # of a model that is no more
    old = MEMORY - FRESH
    assert torch.equal(kept[1]["examples/x"][:old], kept[0]["examples/x"][-old:])
    forgetful = learned(simulate(run(tmp_path / "b", 3, memory=0)), tmp_path / "b")
    assert not all(torch.equal(t, forgetful[n]) for n, t in learned(outcome, tmp_path).items())


def test_a_run_that_was_interrupted_ends_with_the_same_bits(tmp_path: Path) -> None:
    def stop(record: RoundRecord, planned: int) -> None:
        if record.round == 2:
            raise KeyboardInterrupt

    whole = simulate(run(tmp_path / "a"))
    begun = simulate(run(tmp_path / "b"), on_round=stop)
    ended = simulate(run(tmp_path / "b"), resume=begun.run_id)
    pairs = [
        (learned(whole, tmp_path / "a"), learned(ended, tmp_path / "b")),
        (
            remembered(whole, tmp_path / "a", 4),
            remembered(ended, tmp_path / "b", 4),
        ),
    ]
    for expected, found in pairs:
        assert expected.keys() == found.keys()
        assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def test_another_tasks_memory_is_refused(tmp_path: Path) -> None:
    outcome = simulate(run(tmp_path, 1))
    other = ClientStates(tmp_path / outcome.run_id / "clients.db", "fedavg")
    with pytest.raises(RunError, match="keep the tensors of 'fedavg on dqn'"):
        other.get(2, ["pole000"])


def test_the_files_size_is_bounded(tmp_path: Path) -> None:
    small = {"lr": 0.05, "batch_size": 16, "local_steps": 2, "state_gib": 1e-6}
    with pytest.raises(RunError, match="state_gib"):
        simulate(run(tmp_path, client=small))


def test_a_client_can_be_hidden_with_all_that_it_remembers(tmp_path: Path) -> None:
    privacy = {"clip_norm": 1.0, "noise_multiplier": 0.1, "delta": 1e-5}
    with pytest.raises(InputError, match="use unit = 'client'"):
        simulate(run(tmp_path, privacy={**privacy, "unit": "example"}))
    uniform = {"cohort": 3, "weights": "uniform"}
    hidden = simulate(run(tmp_path, 2, privacy={**privacy, "unit": "client"}, strategy=uniform))
    assert hidden.privacy is not None
    assert len(remembered(hidden, tmp_path, 2)["examples/x"]) > 0


def test_over_flower_it_stays_at_the_site_and_survives_a_restart(tmp_path: Path) -> None:
    prepared = prepare(run(tmp_path))
    strategy, model = prepared.strategy, prepared.model()
    start = Start(0, model, strategy.init(model.params))
    nodes: list[dict[str, object]] = [
        {"client": name, "state": str(tmp_path / "sites" / name)} for name in prepared.data.names
    ]

    def go(federation: Federation, begin: Start, total: int) -> Start:
        file = run(tmp_path, total)
        for result in rounds(file, strategy, federation, begin, lambda r, m: Scores({}, {}), "one"):
            begin = Start(result.record.round, result.model, result.state)
            assert len(result.record.participants) == 3
        return begin

    def grid() -> GridFederation:
        return GridFederation(LocalGrid(client_app, nodes), run(tmp_path, 3), sites=3)

    found = go(grid(), go(grid(), start, 2), 3)
    twin = sequential(run(tmp_path, 3), prepared.data, prepared.task, strategy.client)
    expected = go(twin, start, 3)
    for name, tensor in expected.model.params.items():
        torch.testing.assert_close(found.model.params[name], tensor)
    for name in prepared.data.names:
        with closing(sqlite3.connect(tmp_path / "sites" / name / "one" / "clients.db")) as file:
            assert file.execute("SELECT DISTINCT client FROM own").fetchall() == [(name,)]
