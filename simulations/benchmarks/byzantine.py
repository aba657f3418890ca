"""Accuracy under attack on MNIST: the trimmed mean beside ByzFL's published worst cases.

    python -m umbel.simulations.benchmarks.byzantine --data FOLDER [--gamma 1.0] [--f 1]

Ten honest clients hold all training examples, by gamma-similarity; f hostile ones join and know
every honest update and the rule. The rule clips adaptively, mixes nearest neighbours and trims. The
figure is the accuracy on the test set, in the worst of the attacks.

ByzFL's default benchmark trains 800 rounds of one step (batch 25, rate 0.1, momentum 0.9 at the
workers); here 80 rounds of ten local steps each, of the same batch and rate, with momentum within a
round and, of the deltas, over rounds. The CNN is smaller.

Source: González et al. 2025, ByzFL, section 4 (arXiv:2505.24802), and its benchmark's defaults.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from umbel.core.run_file import resolve
from umbel.simulations.simulate import simulate

PUBLISHED = {
    1.0: {1: 0.98, 2: 0.98, 3: 0.98},
    0.66: {1: 0.98, 2: 0.97, 3: 0.97},
    0.33: {1: 0.98, 2: 0.97, 3: 0.94},
}
ATTACKS: dict[str, dict[str, Any]] = {
    "sign flip": {"kind": "sign-flip", "of": "honest-mean"},
    "IPM": {"kind": "ipm", "epsilon": "search"},
    "ALIE": {"kind": "alie", "z": "search"},
}
WITHIN = 0.01
ROUNDS = 80


def accuracy(
    data: Path,
    store: str,
    gamma: float,
    f: int,
    attack: str,
    rounds: int = ROUNDS,
    seed: int = 0,
) -> float:
    """Test accuracy after one run.

    Args:
        data: the folder that holds ``mnist/``.
        store: where the run is kept.
        gamma: similarity of the honest clients' data.
        f: hostile clients, whom the rule expects.
        attack: a key of ``ATTACKS``.
        rounds: how many.
        seed: of the run.
    """
    table = {
        "run": {
            "name": "byzantine",
            "rounds": rounds,
            "seed": seed,
            "store": store,
            "checkpoint_seconds": 3600.0,
        },
        "data": {
            "name": "mnist",
            "path": str(data),
            "split": {"kind": "gamma-similarity", "clients": 10, "gamma": gamma},
        },
        "task": {
            "kind": "classification",
            "model": {"name": "cnn", "channels": [8, 16], "hidden": 64},
        },
        "client": {
            "lr": 0.1,
            "momentum": 0.9,
            "batch_size": 25,
            "local_steps": 10,
            "weight_decay": 1e-4,
            "device": "cpu",
        },
        "strategy": {
            "name": "trimmed-mean",
            "f": f,
            "mixing": "nnm",
            "clip_norm": "adaptive",
            "client_momentum": 0.9,
        },
        "attack": {**ATTACKS[attack], "count": f, "join": True},
        "evaluate": {"every": 0, "per_client": False},
    }
    return simulate(resolve(table)).metrics["accuracy"]


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--data", type=Path, required=True, help="the folder that holds mnist/")
    options.add_argument("--gamma", type=float, choices=PUBLISHED, help="one of the splits alone")
    options.add_argument("--f", type=int, choices=(1, 2, 3), help="so many hostile clients alone")
    options.add_argument("--rounds", type=int, default=ROUNDS)
    options.add_argument("--seed", type=int, default=0)
    return options


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Accuracy by split, hostile clients and attack, with the published worst cases."""
    cells = []
    for gamma in PUBLISHED if options.gamma is None else [options.gamma]:
        for f in PUBLISHED[gamma] if options.f is None else [options.f]:
            began = time.perf_counter()
            with tempfile.TemporaryDirectory() as store:
                found = {
                    attack: accuracy(
                        options.data, store, gamma, f, attack, options.rounds, options.seed
                    )
                    for attack in ATTACKS
                }
            worst, published = min(found.values()), PUBLISHED[gamma][f]
            cells.append(
                {
                    "gamma": gamma,
                    "f": f,
                    **found,
                    "worst": worst,
                    "published": published,
                    "reached": worst >= published - WITHIN,
                    "seconds": round(time.perf_counter() - began, 1),
                }
            )
    return {"cells": cells, "passed": all(cell["reached"] for cell in cells)}


def show(result: dict[str, Any]) -> None:
    """Prints the table; exits 1 where a figure is more than a point below the published one."""
    names = ["gamma", "f", *ATTACKS, "worst", "published", "seconds"]
    table = Table(*names)
    for cell in result["cells"]:
        table.add_row(
            *(
                f"{v:.4f}"
                if isinstance(v := cell[n], float) and n in (*ATTACKS, "worst")
                else str(v)
                for n in names
            )
        )
    Console(width=100).print(table)
    raise SystemExit(int(not result["passed"]))


def main() -> None:
    """Measures and prints."""
    show(measure(parser().parse_args()))


if __name__ == "__main__":
    main()
