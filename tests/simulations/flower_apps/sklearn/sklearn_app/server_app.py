"""sklearn-app: A Flower / scikit-learn app."""

import json
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from sklearn_app.task import get_model, get_model_params, set_initial_params

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Main entry point for the ServerApp."""
    num_rounds: int = context.run_config["num-server-rounds"]
    model = get_model(context.run_config["penalty"], context.run_config["local-epochs"])
    set_initial_params(model)

    strategy = FedAvg(fraction_train=1.0, fraction_evaluate=1.0)
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(get_model_params(model)),
        num_rounds=num_rounds,
    )

    if out := context.run_config["out"]:
        np.savez(Path(out) / "model.npz", *result.arrays.to_numpy_ndarrays())
        metrics = {
            kind: {r: dict(m) for r, m in getattr(result, f"{kind}_metrics_clientapp").items()}
            for kind in ("train", "evaluate")
        }
        (Path(out) / "metrics.json").write_text(json.dumps(metrics))
