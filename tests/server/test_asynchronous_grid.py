"""Asynchronous runs on Flower's Grid: replies are pulled as they come."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.local_grid import LocalGrid

from umbel.client.flower.app import app as client_app
from umbel.core.run_file import resolve
from umbel.server.asynchronous import asynchronous
from umbel.server.flower.grid import GridFederation
from umbel.server.records import Scores
from umbel.server.rounds import Start
from umbel.simulations.prepare import prepare

CLIENTS = 3


@pytest.mark.parametrize(
    "strategy", [{"name": "fedbuff", "buffer": 2}, {"name": "fedasync", "alpha": 0.5}]
)
def test_a_slow_site_does_not_hold_up_the_others(strategy: dict[str, Any]) -> None:
    run = resolve(
        {
            "run": {"rounds": 6, "seed": 3},
            "data": {"name": "breast-cancer", "split": {"kind": "iid", "clients": CLIENTS}},
            "task": {"kind": "classification", "model": "logistic"},
            "client": {"lr": 0.05, "local_steps": 3, "device": "cpu"},
            "strategy": {"speed": "real", **strategy},
            "evaluate": {"every": 0},
        }
    )
    prepared = prepare(run)
    configs = [{"partition-id": i, "num-partitions": CLIENTS} for i in range(CLIENTS)]
    grid = LocalGrid(client_app, configs)
    federation = GridFederation(grid, run, sites=CLIENTS)
    grid.delay[1001] = 3600.0  # c1, from now on: its replies are never there in time
    start = Start(0, prepared.model(), {})
    results = list(
        asynchronous(run, prepared.strategy, federation, start, lambda r, m: Scores({}, {}))
    )
    buffer = strategy.get("buffer", 1)
    for record in (result.record for result in results):
        assert len(set(record.participants)) == buffer
        assert set(record.participants) <= {"c0", "c2"}
        assert buffer == 1 or record.staleness == [0, 0]
    assert len(results) == 6
    first, last = prepared.model().params, results[-1].model.params
    assert not any(torch.equal(first[name], last[name]) for name in first)
