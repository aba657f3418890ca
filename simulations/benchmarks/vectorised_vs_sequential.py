"""Seconds a round: many clients in one computation, against one client after another.

    python -m umbel.simulations.benchmarks.vectorised_vs_sequential [--runs 5] [--threads 1]

Synthetic data in the shape of the real: 100 clients of a small CNN (28 x 28, 50 examples each, one
epoch of batches of 10), and 100 clients of a logistic regression (one step of 10 examples). Both
engines run the same rounds, in turn, so that whatever else the machine does hits both alike.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from umbel.core.payloads import Federation, TrainPlan, Updates
from umbel.core.run_file import RunFile, resolve
from umbel.core.trees import Model
from umbel.datasets.federated import FederatedData, Holdings, Info, Numbered
from umbel.simulations.engines.sequential import sequential
from umbel.simulations.engines.vectorised import vectorised
from umbel.strategies.parts import ClientRule
from umbel.tasks.build import initial_module, model_of
from umbel.tasks.task import Task


class Case(NamedTuple):
    """One row of the table."""

    title: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    classes: int
    examples: int
    client: dict[str, object]


def cnn() -> nn.Module:
    """Convolutions of 16 and 32 channels, dense 40: 67 970 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(1568, 40),
        nn.ReLU(),
        nn.Linear(40, 10),
    )


CASES = (
    Case("cnn, 5 steps of 10", cnn, (1, 28, 28), 10, 50, {"lr": 0.05, "local_epochs": 1}),
    Case(
        "logistic 784->10, 1 step of 10",
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 10)),
        (1, 28, 28),
        10,
        50,
        {"lr": 0.05, "local_steps": 1},
    ),
    Case(
        "logistic 64->10, 1 step of 10",
        lambda: nn.Linear(64, 10),
        (64,),
        10,
        50,
        {"lr": 0.05, "local_steps": 1},
    ),
)


def make(case: Case, clients: int, device: str) -> tuple[RunFile, FederatedData, Task]:
    """A run, its data and its task."""
    draw = np.random.default_rng(0)
    count = clients * case.examples
    data = FederatedData(
        Info("synthetic", case.shape, case.classes),
        Numbered(clients),
        {
            "x": draw.standard_normal((count, *case.shape), dtype=np.float32),
            "y": draw.integers(0, case.classes, count),
        },
        Holdings.of(np.split(np.arange(count), clients)),
        None,
        None,
        None,
    )
    task = Task(
        case.build,
        lambda model, batch: functional.cross_entropy(
            model(batch["x"]), batch["y"], reduction="none"
        ),
        lambda model, batch: {"accuracy": (model(batch["x"]).argmax(-1) == batch["y"]).float()},
    )
    client = {"batch_size": 10, "device": device, **case.client}
    table = {"data": {"name": "synthetic"}, "task": {"kind": "synthetic"}, "client": client}
    return resolve(table), data, task


def seconds(federation: Federation, round_number: int, model: Model) -> float:
    """Wall time of one round of every client."""
    clients = federation.clients()
    plan = TrainPlan(round_number, clients, model, len(clients))
    start = time.perf_counter()
    answered = 0
    for item in federation.train(plan):
        assert isinstance(item, Updates), item
        answered += len(item.clients)
        next(iter(item.delta.values())).sum().item()  # waits for a GPU to finish
    assert answered == len(clients)
    return time.perf_counter() - start


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=5, help="rounds of each engine")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0: its own choice")
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.device}")
    print(f"{options.clients} clients, seconds a round, median of {options.runs}")
    print(f"{'':32}{'parameters':>12}{'sequential':>12}{'vectorised':>12}{'ratio':>8}")
    for case in CASES:
        run, data, task = make(case, options.clients, options.device)
        model = model_of(initial_module(task, run.run.seed))
        engines = [f(run, data, task, ClientRule(), print) for f in (sequential, vectorised)]
        for engine in engines:  # warm, and the trial done
            seconds(engine, 1, model)
        times = [[seconds(e, 1 + i, model) for e in engines] for i in range(options.runs)]
        slow, fast = (statistics.median(column) for column in zip(*times, strict=True))
        size = sum(p.numel() for p in model.params.values())
        print(f"{case.title:32}{size:>12}{slow:>12.4f}{fast:>12.4f}{slow / fast:>8.2f}")


if __name__ == "__main__":
    main()
