"""pytorch-app: A Flower / PyTorch app."""

import json
from pathlib import Path

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from pytorch_app.task import Net

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Main entry point for the ServerApp."""
    fraction_train: float = context.run_config["fraction-train"]
    num_rounds: int = context.run_config["num-server-rounds"]
    lr: float = context.run_config["learning-rate"]

    # Load global model
    torch.manual_seed(0)
    arrays = ArrayRecord(Net().state_dict())

    strategy = FedAvg(fraction_train=fraction_train)
    result = strategy.start(
        grid=grid,
        initial_arrays=arrays,
        train_config=ConfigRecord({"lr": lr}),
        num_rounds=num_rounds,
    )

    # Save final model to disk
    if out := context.run_config["out"]:
        state_dict = result.arrays.to_torch_state_dict()
        np.savez(Path(out) / "model.npz", **{k: v.numpy() for k, v in state_dict.items()})
        metrics = {
            kind: {r: dict(m) for r, m in getattr(result, f"{kind}_metrics_clientapp").items()}
            for kind in ("train", "evaluate")
        }
        (Path(out) / "metrics.json").write_text(json.dumps(metrics))
