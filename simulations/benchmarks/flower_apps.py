"""An unmodified Flower app by ``umbel flower`` and by Flower's own simulation, side by side.

    python -m umbel.simulations.benchmarks.flower_apps [--repeats 2] [--rounds 5]

W1: 1,000 nodes of 50 images of 28 × 28, a tenth of them a round, an epoch in batches of 10, a CNN
of 68k parameters. W2: 100 nodes, all of them a round, one step of 10 examples, a logistic
regression of 650 parameters. Flower runs tuned: a Ray actor of one thread for each core. The runs
are interleaved, whole processes, timed from their start.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

APP = Path(__file__).parent / "flower_app"
WORKLOADS = {
    "W1": (1000, "model='cnn' fraction-train=0.1 examples=50 steps=5"),
    "W2": (100, "model='logistic' fraction-train=1.0 examples=10 steps=1"),
}
SYSTEMS = {
    "Flower": ["-m", "umbel.server.flower.ray_simulation"],
    "umbel flower": ["-c", "from umbel.cli.main import main; main()", "flower"],
}
WANTED = {"W1": 2.2, "W2": 10.0}


class Timing(NamedTuple):
    """Seconds: until the end of round 1, and of each round after it."""

    first: float
    rounds: list[float]


def measure(command: list[str], supernodes: int, config: str) -> Timing:
    """Runs one system on one workload."""
    options = [str(APP), "--supernodes", str(supernodes), "--run-config", config]
    began = time.time()
    done = subprocess.run(
        [sys.executable, *command, *options], capture_output=True, text=True, check=False
    )
    ends = [float(t) for t in re.findall(r"^round \d+ ([\d.]+)$", done.stdout, re.MULTILINE)]
    if done.returncode or len(ends) < 3:
        sys.stderr.write(done.stderr)
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}")
    lengths = [b - a for a, b in pairwise(ends[1:])]
    return Timing(ends[1] - began, lengths)


def main() -> None:
    """Prints the table; exits 1 where a ratio is below what is wanted."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS), choices=WORKLOADS)
    options = parser.parse_args()
    table = Table("workload", "system", "s a round", "end of round 1, s", "times Flower")
    missed = False
    for workload in options.workloads:
        supernodes, config = WORKLOADS[workload]
        rounds = options.rounds if workload == "W1" else 4 * options.rounds
        found: dict[str, list[Timing]] = {name: [] for name in SYSTEMS}
        for _ in range(options.repeats):
            for name, command in SYSTEMS.items():
                timing = measure(command, supernodes, f"{config} num-server-rounds={rounds}")
                found[name].append(timing)
        medians = {
            name: statistics.median(s for timing in timings for s in timing.rounds)
            for name, timings in found.items()
        }
        for name, timings in found.items():
            ratio = medians["Flower"] / medians[name]
            first = statistics.median(timing.first for timing in timings)
            table.add_row(workload, name, f"{medians[name]:.3f}", f"{first:.1f}", f"{ratio:.1f}")
        missed |= medians["Flower"] / medians["umbel flower"] < WANTED[workload]
    console = Console()
    console.print(table)
    load = os.getloadavg()[1]
    console.print(f"{os.cpu_count()} cores, load {load:.1f}; wanted: W1 2.2, W2 10 times Flower")
    raise SystemExit(int(missed))


if __name__ == "__main__":
    main()
