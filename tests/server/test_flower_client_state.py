"""On Flower, a client's state stays with the client, and survives its node."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.local_grid import LocalGrid

from umbel.client.flower.app import app as client_app
from umbel.core.payloads import Failure, Federation, TrainPlan, Updates
from umbel.core.run_file import RunFile, resolve
from umbel.core.trees import flatten
from umbel.server.flower.grid import GridFederation
from umbel.server.records import Scores
from umbel.server.rounds import Start, rounds
from umbel.simulations.engines.sequential import sequential
from umbel.simulations.prepare import prepare


def run_file(total: int) -> RunFile:
    return resolve(
        {
            "run": {"rounds": total, "seed": 3},
            "data": {
                "name": "breast-cancer",
                "split": {"kind": "dirichlet", "clients": 3, "alpha": 0.5},
                "holdout": 0.0,
            },
            "task": {"kind": "classification", "model": "logistic"},
            "client": {"lr": 0.05, "local_steps": 3, "device": "cpu"},
            "strategy": {"name": "scaffold"},
        }
    )


def nodes(folder: Path | None) -> list[dict[str, object]]:
    configs: list[dict[str, object]] = [{"client": f"c{i}"} for i in range(3)]
    return configs if folder is None else [{**c, "state": str(folder)} for c in configs]


def test_variates_survive_a_restart_of_nodes_and_server(tmp_path: Path) -> None:
    prepared = prepare(run_file(4))
    strategy, model = prepared.strategy, prepared.model()
    start = Start(0, model, strategy.init(model.params))

    def go(federation: Federation, begin: Start, total: int) -> Start:
        for result in rounds(
            run_file(total), strategy, federation, begin, lambda r, m: Scores({}, {}), "run-1"
        ):
            begin = Start(result.record.round, result.model, result.state)
            assert len(result.record.participants) == 3
        return begin

    def grid() -> GridFederation:
        return GridFederation(LocalGrid(client_app, nodes(tmp_path)), run_file(4), sites=3)

    half = go(grid(), start, 2)
    found = go(grid(), half, 4)
    twin = sequential(run_file(4), prepared.data, prepared.task, strategy.client)
    expected = go(twin, start, 4)
    for name, tensor in expected.model.params.items():
        torch.testing.assert_close(found.model.params[name], tensor)
        torch.testing.assert_close(found.state["c"][name], expected.state["c"][name])
    assert (tmp_path / "run-1" / "clients.db").exists()


def ask(folder: Path | None, run_id: str) -> Updates | Failure:
    run = run_file(1)
    prepared = prepare(run)
    model = prepared.model()
    shared = flatten({"c": prepared.strategy.init(model.params)["c"]})
    federation = GridFederation(LocalGrid(client_app, nodes(folder)), run, sites=3)
    plan = TrainPlan(1, ["c0"], model, 1, shared=shared, uploads=shared, run_id=run_id)
    [item] = federation.train(plan)
    return item


def test_a_node_without_a_folder_refuses() -> None:
    item = ask(None, "run-1")
    assert isinstance(item, Failure)
    assert "has no place for what the strategy has clients keep" in item.reason


@pytest.mark.parametrize("run_id", ["../other", "", "/tmp/x", "a/b"])
def test_a_run_id_that_is_no_name_is_refused(run_id: str, tmp_path: Path) -> None:
    assert isinstance(ask(tmp_path / "site", run_id), Failure)
    assert not list(tmp_path.iterdir())
