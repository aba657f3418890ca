"""Forgetting on Split-MNIST, federated: what each defence keeps of five experiences of two digits.

    python -m umbel.simulations.benchmarks.split_mnist --data FOLDER [--only replay] [--rounds 10]

Five clients, five experiences, ten rounds of one local epoch each; a perceptron of 2 x 400, Adam at
1e-3, batches of 64. The figure is ACC: the mean accuracy over all experiences after the last. In
the task-incremental setting the experience of an example is known (a head for each), in the
class-incremental one it is not.

Source: van de Ven and Tolias 2019 (arXiv:1904.07734), whose network and optimizer these are.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from umbel.core.run_file import resolve
from umbel.simulations.simulate import simulate

SPLITS: dict[str, dict[str, Any]] = {
    "iid": {"kind": "iid", "clients": 5},
    "dirichlet 0.5": {"kind": "dirichlet", "clients": 5, "alpha": 0.5},
}


class Row(NamedTuple):
    """One line of the table: a defence in a setting, and the ACC to reach, or not to pass."""

    name: str
    defence: str | dict[str, Any]
    head: str
    split: str
    least: float | None = None
    most: float | None = None
    strategy: dict[str, Any] | None = None


EWC = {"name": "ewc", "strength": 10000.0}
REPLAY = {"name": "replay", "per_class": 40}
HERD = {**REPLAY, "choice": "herding"}
NCM = {"name": "ncm", "per_class": 40}
DER = {"name": "der", "per_class": 40}
FEDCURV = {"name": "fedcurv", "strength": 1.0, "weights": "uniform"}
ROWS = (
    Row("naive, class-incremental", "naive", "single", "iid", most=0.21),
    Row("naive, task-incremental", "naive", "multi", "iid"),
    Row("EWC, task-incremental", EWC, "multi", "iid", least=0.96),
    Row("EWC, class-incremental", EWC, "single", "iid"),
    Row("MAS, task-incremental", "mas", "multi", "iid"),
    Row("SI, task-incremental", "si", "multi", "iid"),
    Row("adapters, task-incremental", {"name": "adapters", "rank": 8}, "multi", "iid"),
    Row("columns, task-incremental", "columns", "multi", "iid"),
    Row("LwF, task-incremental", "lwf", "multi", "iid"),
    Row("LwF, class-incremental", "lwf", "single", "iid"),
    Row("replay, class-incremental", REPLAY, "single", "iid", least=0.88),
    Row("replay, class-incremental", REPLAY, "single", "dirichlet 0.5", least=0.86),
    Row("replay, herding, class-incremental", HERD, "single", "iid", least=0.88),
    Row("NCM, class-incremental", NCM, "single", "iid"),
    Row("DER++, class-incremental", DER, "single", "iid", least=0.88),
    Row("DER++, class-incremental", DER, "single", "dirichlet 0.5", least=0.86),
    Row("FedCurv, class-incremental", "naive", "single", "iid", strategy=FEDCURV),
    Row("FedCurv, task-incremental", "naive", "multi", "iid", strategy=FEDCURV),
)


def run(row: Row, data: Path, store: str, rounds: int, seed: int) -> dict[str, Any]:
    """One run: its figures, and the seconds it took."""
    began = time.perf_counter()
    table = {
        "run": {
            "name": "split-mnist",
            "rounds": 5 * rounds,
            "seed": seed,
            "store": store,
            "checkpoint_seconds": 3600.0,
        },
        "data": {"name": "mnist", "path": str(data), "split": SPLITS[row.split]},
        "task": {"kind": "classification", "model": {"name": "mlp", "hidden": [400, 400]}},
        "client": {"optimizer": "adam", "lr": 1e-3, "batch_size": 64, "device": "cpu"},
        "continual": {"experiences": 5, "head": row.head, "defence": row.defence},
        "strategy": row.strategy or {"name": "fedavg"},
        "evaluate": {"every": rounds, "per_client": False},
    }
    found = simulate(resolve(table)).continual
    acc = found["acc"]
    return {
        "defence": row.name,
        "split": row.split,
        "acc": acc,
        "bwt": found["bwt"],
        "forgetting": found["forgetting"],
        "fwt": found["fwt"],
        "least": row.least,
        "most": row.most,
        "reached": (row.least is None or acc >= row.least)
        and (row.most is None or acc <= row.most),
        "matrix": found["matrix"],
        "seconds": round(time.perf_counter() - began, 1),
    }


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--data", type=Path, required=True, help="the folder that holds mnist/")
    options.add_argument("--only", default="", help="the rows whose name has this in it")
    options.add_argument("--rounds", type=int, default=10, help="of each experience")
    options.add_argument("--seed", type=int, default=0)
    return options


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The figures of each row."""
    wanted = [row for row in ROWS if options.only.lower() in row.name.lower()]
    found = []
    for row in wanted:
        with tempfile.TemporaryDirectory() as store:
            found.append(run(row, options.data, store, options.rounds, options.seed))
    return {"rows": found, "passed": all(row["reached"] for row in found)}


def show(result: dict[str, Any]) -> None:
    """Prints the table; exits 1 where a bound was missed."""
    names = ["defence", "split", "acc", "bwt", "forgetting", "fwt", "least", "most", "seconds"]
    table = Table(*names)
    for row in result["rows"]:
        cells = ["" if row[n] is None else row[n] for n in names]
        table.add_row(*(f"{c:.3f}" if isinstance(c, float) else str(c) for c in cells))
    Console(width=120).print(table)
    raise SystemExit(int(not result["passed"]))


def main() -> None:
    """Measures and prints."""
    show(measure(parser().parse_args()))


if __name__ == "__main__":
    main()
