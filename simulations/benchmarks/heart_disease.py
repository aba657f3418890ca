"""FLamby's Fed-Heart-Disease table: three strategies, five seeds, beside the published figures.

    python -m umbel.simulations.benchmarks.heart_disease --data FOLDER

FOLDER holds ``heart_disease/``; where it holds ``flamby_reference_results/`` as well, the published
figures are read from there. Settings are those of the reference: 15 rounds of 100 local steps of
batch 4, SGD at the clients, and the learning rates of its tuned rows. The figure is the mean of the
four hospitals' test accuracies, weighted by their test examples.

Source: Ogier du Terrail et al. 2022, FLamby, section 4 (arXiv:2210.04620), and its repository's
``flamby/results/results_benchmark_fed_heart_disease``.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import tempfile
from importlib.resources import files
from pathlib import Path

from rich.console import Console
from rich.table import Table

from umbel.core.run_file import load
from umbel.simulations.simulate import simulate

SEEDS = range(42, 47)
TESTS = (104, 89, 16, 45)
ADAPTIVE = ["strategy.beta1=0.9", "strategy.tau=1e-8"]
ROWS = {
    "fedavg": (0.70, ["client.lr=0.001"]),
    "fedadam": (
        0.73,
        ["client.lr=0.01", "strategy.server_lr=0.01", "strategy.beta2=0.999", *ADAPTIVE],
    ),
    "fedadagrad": (0.735, ["client.lr=0.003162", "strategy.server_lr=0.316228", *ADAPTIVE]),
}
NAMES = {"fedavg": "FedAvg100", "fedadam": "FedAdam100", "fedadagrad": "FedAdagrad100"}


def accuracy(strategy: str, seed: int, data: Path, store: str) -> float:
    """Sample-weighted mean test accuracy of the four hospitals after one run."""
    recipe = files("umbel.simulations.recipes").joinpath("heart-disease.toml")
    settings = [
        f"run.seed={seed}",
        f"run.store={store}",
        "run.checkpoint_seconds=60",
        "evaluate.every=0",
        f"data.path={data}",
        f"strategy.name={strategy}",
        *ROWS[strategy][1],
    ]
    return simulate(load(str(recipe), settings)).metrics["accuracy"]


def published(strategy: str, data: Path) -> list[float]:
    """The reference's accuracies, one a seed; empty where its files are missing."""
    found = []
    for seed in SEEDS:
        path = data / "flamby_reference_results" / f"heart_seed{seed}.csv"
        if not path.exists():
            return []
        with path.open() as lines:
            by_test = {
                row["Test"]: float(row["Metric"])
                for row in csv.DictReader(lines)
                if row["Method"] == NAMES[strategy]
            }
        hospitals = [by_test[f"client_test_{i}"] for i in range(4)]
        found.append(sum(a * n for a, n in zip(hospitals, TESTS, strict=True)) / sum(TESTS))
    return found


def main() -> None:
    """Prints the table; exits 1 where a figure to reach is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    data = parser.parse_args().data
    table = Table("strategy", *map(str, SEEDS), "mean", "to reach", "published")
    missed = False
    with tempfile.TemporaryDirectory() as store:
        for strategy, (target, _) in ROWS.items():
            scores = [accuracy(strategy, seed, data, store) for seed in SEEDS]
            mean = statistics.mean(scores)
            missed |= mean < target
            reference = published(strategy, data)
            table.add_row(
                strategy,
                *(f"{s:.3f}" for s in scores),
                f"{mean:.3f}",
                f"{target:.3f}",
                f"{statistics.mean(reference):.3f}" if reference else "not at hand",
            )
    Console(width=100).print(table)
    raise SystemExit(int(missed))


if __name__ == "__main__":
    main()
