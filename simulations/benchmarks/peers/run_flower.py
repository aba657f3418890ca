"""Flower's own simulation: ServerApp with its FedAvg, ClientApp, the Ray backend.

Tuned: one actor of one thread a core, and data, model and optimizer kept in the actors. Started
in this process by ``run_simulation``, which spares Flower the start of a SuperLink that ``flwr
run`` would pay. A round is what lies between two calls of the server's evaluation function.

Source: https://flower.ai/docs/framework/how-to-run-simulations.html, client resources.
"""

from __future__ import annotations

import logging
import os
import sys

import peer
import torch
from flower_client import app as client
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

server = ServerApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Runs the rounds."""
    w = peer.work()

    def evaluated(number: int, arrays: ArrayRecord) -> None:
        if number:
            peer.ended(number)
        else:
            peer.began()

    start = {name: torch.from_numpy(value) for name, value in peer.initial(w).items()}
    strategy = FedAvg(
        fraction_train=w.cohort / w.clients,
        fraction_evaluate=0.0,
        min_available_nodes=w.clients,
    )
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(start),
        num_rounds=w.rounds,
        evaluate_fn=evaluated,
    )
    peer.finish(w, result.arrays.to_torch_state_dict(), "flwr", "ray", "torch")


if __name__ == "__main__":
    os.environ["BENCH_WORK"] = sys.argv[1]  # for Ray's workers, which inherit it
    logging.getLogger("flwr").setLevel(logging.ERROR)
    options = peer.work().options
    resources = {
        "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        "init_args": {
            "address": "local",  # never a cluster that somebody else has started here
            "num_cpus": options["actors"],
            "include_dashboard": False,
            "log_to_driver": False,
        },
    }
    run_simulation(
        server,
        client,
        peer.work().clients,
        backend_config=resources if options["actors"] else None,
    )
