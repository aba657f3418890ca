"""Omniglot, 5-way: federated episodic training, tested on characters that no client holds.

    python -m umbel.simulations.benchmarks.omniglot --data FOLDER

FOLDER holds ``omniglot/``. The 30 alphabets of the background set are the clients; the 659
characters of the evaluation set are drawn into the same 600 test episodes for every row. Published
figures are of central training on 1,200 characters and their rotations, over 40,000 episodes and
more; the column "episodes" says how many all clients together trained on here.

Source: Snell et al. 2017, table 1 (arXiv:1703.05175), Finn et al. 2017, table 1
(arXiv:1703.03400), Nichol et al. 2018, table 1 (arXiv:1803.02999), Vinyals et al. 2016, table 1
(arXiv:1606.04080).
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from umbel.core.run_file import RunFile, resolve
from umbel.simulations.simulate import simulate

CLIENTS = 30
COHORT = 10


class Row(NamedTuple):
    """One line of the table.

    Args:
        method: of the task.
        shots: known examples of each class, in training and in the test.
        target: the accuracy to reach; ``None``: reported only.
        published: the paper's.
        strategy: the ``[strategy]`` table.
        task: further keys of ``[task]``.
        client: ``[client]``.
        length: rounds, as a share of those asked for.
    """

    method: str
    shots: int
    target: float | None
    published: float
    strategy: dict[str, Any]
    task: dict[str, Any]
    client: dict[str, Any]
    length: float = 1.0


METRIC = {"optimizer": "adam", "lr": 1e-3, "local_steps": 10}
META = {"optimizer": "adam", "lr": 1e-3, "local_steps": 10}
MANY_WAYS = {"ways": 14, "queries": 5}
ADAPT = {"ways": 5, "queries": 5, "adapt_steps": 5, "adapt_lr": 0.4}


def _maml(name: str, shots: int) -> dict[str, Any]:
    return {"name": name, "inner_lr": 0.4, "support": shots / (shots + 5)}


ROWS = {
    "prototypical 1-shot": Row("prototypical", 1, 0.95, 0.988, {}, MANY_WAYS, METRIC),
    "prototypical 5-shot": Row("prototypical", 5, 0.985, 0.997, {}, MANY_WAYS, METRIC),
    "matching 1-shot": Row("matching", 1, None, 0.981, {}, MANY_WAYS, METRIC),
    "maml 1-shot": Row("gradient", 1, None, 0.987, _maml("maml", 1), ADAPT, META),
    "fomaml 1-shot": Row("gradient", 1, None, 0.983, _maml("fomaml", 1), ADAPT, META),
    "reptile 1-shot": Row(
        "gradient",
        1,
        None,
        0.977,
        {"name": "reptile", "server_lr": 1.0},
        {**ADAPT, "adapt_steps": 20, "adapt_lr": 0.1},
        {"optimizer": "adam", "lr": 1e-3, "beta1": 0.0, "local_steps": 10},
    ),
}


def run_file(name: str, rounds: int, data: str, store: str, seed: int = 0) -> RunFile:
    """The run of one line."""
    row = ROWS[name]
    return resolve(
        {
            "run": {
                "name": name.replace(" ", "-"),
                "rounds": max(1, round(rounds * row.length)),
                "seed": seed,
                "store": store,
                "checkpoint_seconds": 60.0,
            },
            "data": {"name": "omniglot", "path": data, "owner": "alphabet"},
            "task": {
                "kind": "few-shot",
                "model": "conv4",
                "method": row.method,
                "shots": row.shots,
                "test_ways": 5,
                "test_queries": 15,
                "test_episodes": 600,
                **row.task,
            },
            "client": row.client,
            "strategy": {"name": "fedavg", "cohort": COHORT, "weights": "uniform", **row.strategy},
            "evaluate": {"every": 0},
        }
    )


def main() -> None:
    """Prints the table; exits 1 where a figure to reach is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--only", nargs="*", choices=[*ROWS], default=[*ROWS])
    given = parser.parse_args()
    table = Table("Omniglot, 5-way", "episodes", "accuracy", "to reach", "published", "seconds")
    missed = False
    with tempfile.TemporaryDirectory() as store:
        for name in given.only:
            row = ROWS[name]
            run = run_file(name, given.rounds, given.data, store)
            outcome = simulate(run)
            accuracy = outcome.metrics["accuracy"]
            missed |= row.target is not None and accuracy < row.target
            episodes = run.run.rounds * COHORT * row.client["local_steps"]
            table.add_row(
                name,
                f"{episodes:,}",
                f"{accuracy:.3f}",
                "" if row.target is None else f"≥ {row.target}",
                f"{row.published}",
                f"{outcome.seconds:.0f}",
            )
    Console(width=100).print(table)
    raise SystemExit(missed)


if __name__ == "__main__":
    main()
