"""The server: Flower's template with one line changed, the strategy."""

from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp

import umbel
from flower_app.task import model
from umbel.strategies.fedadam import fedadam

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Five rounds of FedAdam; Umbel's update gate stands before it."""
    strategy = umbel.as_flower(fedadam(server_lr=0.03), seed=1)
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(model().state_dict()),
        num_rounds=int(context.run_config["num-server-rounds"]),
    )
    last = max(result.evaluate_metrics_clientapp)
    print(f"accuracy after round {last}: {result.evaluate_metrics_clientapp[last]['accuracy']:.3f}")
