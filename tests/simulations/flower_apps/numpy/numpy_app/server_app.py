"""numpy-app: A Flower / NumPy app."""

import json
from pathlib import Path

import numpy as np
from flwr.common import Context, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server import ServerApp, ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg


def weighted_average(metrics):
    """The mean of a metric over the clients' examples."""
    examples = [n for n, _ in metrics]
    return {"rmse": sum(n * m["rmse"] for n, m in metrics) / sum(examples)}


class SavingFedAvg(FedAvg):
    """FedAvg that writes down what each round yields."""

    def __init__(self, out, **options):
        super().__init__(**options)
        self.out = out
        self.history = {"evaluate": {}}

    def aggregate_fit(self, server_round, results, failures):
        parameters, metrics = super().aggregate_fit(server_round, results, failures)
        if self.out:
            np.savez(Path(self.out) / "model.npz", *parameters_to_ndarrays(parameters))
        return parameters, metrics

    def aggregate_evaluate(self, server_round, results, failures):
        loss, metrics = super().aggregate_evaluate(server_round, results, failures)
        self.history["evaluate"][server_round] = {"loss": loss, **metrics}
        if self.out:
            (Path(self.out) / "metrics.json").write_text(json.dumps(self.history))
        return loss, metrics


def server_fn(context: Context):
    strategy = SavingFedAvg(
        context.run_config["out"],
        fraction_fit=1.0,
        fraction_evaluate=1.0,
        min_available_clients=2,
        initial_parameters=ndarrays_to_parameters([np.zeros(4)]),
        on_fit_config_fn=lambda server_round: {"steps": 2 + server_round},
        evaluate_metrics_aggregation_fn=weighted_average,
    )
    config = ServerConfig(num_rounds=context.run_config["num-server-rounds"])
    return ServerAppComponents(strategy=strategy, config=config)


app = ServerApp(server_fn=server_fn)
