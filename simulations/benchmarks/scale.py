"""What a thousand and a million clients cost at the same cohort.

    python -m umbel.simulations.benchmarks.scale [--clients 1000 1000000] [--rounds 300] [--json]

Synthetic data: ten examples of eight numbers a client, dealt evenly; logistic regression; each
round 100 clients take one step. Start-up and memory come from a process of its own for each size;
round times from one process that runs all sizes in turn, so that whatever else the machine does
hits all alike.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from umbel.core.run_file import RunFile, resolve
from umbel.datasets.federated import Dataset, Info

EXAMPLES = 10
FEATURES = 8
CLASSES = 3
COHORT = 100


class Row(NamedTuple):
    """One line of the table.

    Args:
        clients: how many.
        start_seconds: from the run file to the end of round 1, imports left out.
        round_ms: the median round.
        index_bytes: of who holds what.
        data_bytes: of the training examples.
        memory_bytes: the most that a process with this federation held.
    """

    clients: int
    start_seconds: float
    round_ms: float
    index_bytes: int
    data_bytes: int
    memory_bytes: int


def examples(*, clients: int) -> Dataset:
    """The data set: ten examples a client."""
    draw = np.random.default_rng(0)
    x = draw.standard_normal((clients * EXAMPLES, FEATURES), dtype=np.float32)
    y = draw.integers(0, CLASSES, len(x))
    return Dataset(Info("scale", (FEATURES,), CLASSES), {"x": x, "y": y})


def run_file(clients: int, rounds: int, store: str) -> RunFile:
    """A run over so many clients."""
    return resolve(
        {
            "run": {"rounds": rounds, "store": store, "engine_plan": "stacked"},
            "data": {
                "name": f"{__spec__.name if __spec__ else __name__}:examples",
                "clients": clients,
                "holdout": 0.0,
                "split": {"kind": "iid", "clients": clients},
            },
            "task": {"kind": "classification", "model": {"name": "logistic"}},
            "client": {"batch_size": EXAMPLES, "local_steps": 1, "device": "cpu"},
            "strategy": {"name": "fedavg", "cohort": COHORT},
            "evaluate": {"every": 0},
        }
    )


def alone(clients: int) -> dict[str, float]:
    """Start-up and memory of this process, which runs ten rounds over so many clients."""
    from umbel.simulations import prepare
    from umbel.simulations.simulate import simulate

    ends: list[float] = []
    with tempfile.TemporaryDirectory() as store:
        began = time.perf_counter()
        run = run_file(clients, 10, store)
        simulate(run, on_round=lambda record, planned: ends.append(time.perf_counter()))
        peak = _peak_bytes()
        data = prepare.prepare(run).data
    held = data.train_holdings
    return {
        "start_seconds": ends[0] - began,
        "index_bytes": held.offsets.nbytes + held.index.nbytes,
        "data_bytes": sum(column.nbytes for column in data.train.values()),
        "memory_bytes": peak,
    }


def _peak_bytes() -> int:
    # Not getrusage, which begins with the peak of the process that started this one.
    status = Path("/proc/self/status").read_text()
    return next(int(s.split()[1]) for s in status.splitlines() if s.startswith("VmHWM")) * 1024


def round_times(sizes: Sequence[int], rounds: int) -> list[float]:
    """The median round of each size in seconds, the sizes in turn; the first rounds left out."""
    from umbel.server.records import Scores
    from umbel.server.rounds import Start
    from umbel.server.rounds import rounds as loop
    from umbel.simulations.engines.vectorised import vectorised
    from umbel.simulations.prepare import prepare

    warm = 20
    streams = []
    for clients in sizes:
        prepared = prepare(run_file(clients, rounds + warm, "unused"))
        run, strategy, model = prepared.run, prepared.strategy, prepared.model()
        engine = vectorised(run, prepared.data, prepared.task, strategy.client)
        begin = Start(0, model, strategy.init(model.params))
        streams.append(loop(run, strategy, engine, begin, lambda r, m: Scores({}, {})))
    found: list[list[float]] = [[] for _ in sizes]
    for number in range(rounds + warm):
        for times, stream in zip(found, streams, strict=True):
            result = next(stream)
            if number >= warm:
                times.append(result.record.seconds)
    return [statistics.median(times) for times in found]


def measure(sizes: Sequence[int], rounds: int) -> list[Row]:
    """The table."""
    times = round_times(sizes, rounds)
    rows = []
    for clients, seconds in zip(sizes, times, strict=True):
        command = [sys.executable, "-m", __spec__.name, "--one", str(clients)]
        answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found: dict[str, Any] = json.loads(answer)
        rows.append(Row(clients=clients, round_ms=seconds * 1e3, **found))
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description="A thousand and a million clients.")
    parser.add_argument("--clients", type=int, nargs="+", default=[1_000, 1_000_000])
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.one is not None:
        print(json.dumps(alone(given.one)))
        return
    rows = measure(given.clients, given.rounds)
    if given.json:
        print(json.dumps([row._asdict() for row in rows]))
        return
    head = ("clients", "start s", "round ms", "ratio", "index MB", "data MB", "memory MB")
    print("".join(f"{name:>11}" for name in head))
    for row in rows:
        figures = (
            f"{row.clients}",
            f"{row.start_seconds:.2f}",
            f"{row.round_ms:.3f}",
            f"{row.round_ms / rows[0].round_ms:.3f}",
            f"{row.index_bytes / 1e6:.2f}",
            f"{row.data_bytes / 1e6:.1f}",
            f"{row.memory_bytes / 1e6:.0f}",
        )
        print("".join(f"{figure:>11}" for figure in figures))


if __name__ == "__main__":
    main()
