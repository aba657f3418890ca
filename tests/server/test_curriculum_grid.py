"""A curriculum at remote clients, who choose their examples themselves."""

from __future__ import annotations

import torch
from helpers.local_grid import LocalGrid

from umbel.client.flower.app import app as client_app
from umbel.core.payloads import Federation
from umbel.core.run_file import resolve
from umbel.core.trees import Model
from umbel.server.flower.grid import GridFederation
from umbel.server.records import Scores
from umbel.server.rounds import Start, rounds
from umbel.simulations.engines.sequential import sequential
from umbel.simulations.prepare import prepare

CLIENTS = 2


def test_remote_clients_begin_with_the_same_easy_examples() -> None:
    prepared = prepare(
        resolve(
            {
                "run": {"rounds": 3, "seed": 3},
                "data": {"name": "breast-cancer", "split": {"kind": "iid", "clients": CLIENTS}},
                "task": {
                    "kind": "classification",
                    "model": "logistic",
                    "curriculum": {"start": 0.3, "full": 1.0},
                },
                "client": {"batch_size": 16, "device": "cpu"},
                "evaluate": {"every": 0},
            }
        )
    )
    run, strategy = prepared.run, prepared.strategy

    def trained(federation: Federation) -> Model:
        start = Start(0, prepared.model(), {})
        found = list(rounds(run, strategy, federation, start, lambda r, m: Scores({}, {})))
        assert all(len(result.record.participants) == CLIENTS for result in found)
        return found[-1].model

    configs = [{"partition-id": i, "num-partitions": CLIENTS} for i in range(CLIENTS)]
    remote = trained(GridFederation(LocalGrid(client_app, configs), run, sites=CLIENTS))
    here = trained(sequential(run, prepared.data, prepared.task, strategy.client))
    for name, tensor in here.params.items():
        torch.testing.assert_close(remote.params[name], tensor)
