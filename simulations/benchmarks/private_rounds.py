"""What a round of DP-SGD costs in a simulation, against the same round without privacy.

    umbel bench private_rounds [--workload W1] [--runs 3]

Whole rounds as a user gets them, both in turn; medians of all rounds but a run's first.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from umbel.simulations.benchmarks.parts import workloads

GOAL = 2.0
"""The most that a private round may take, in plain rounds."""

PRIVACY: dict[str, dict[str, Any]] = {
    "none": {"unit": "none"},
    "example": {"unit": "example", "noise_multiplier": 1.0},
    "client": {"unit": "client", "noise_multiplier": 1.0},
}


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(prog="umbel bench private_rounds")
    found.add_argument("--workload", choices=sorted(workloads.WORKLOADS), default="W1")
    found.add_argument("--runs", type=int, default=3)
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Unit of privacy -> seconds a round, and times the plain round."""
    from umbel.core import run_file
    from umbel.core.versions import versions
    from umbel.simulations.simulate import simulate

    seconds: dict[str, list[float]] = {name: [] for name in PRIVACY}
    with tempfile.TemporaryDirectory() as folder:
        files = workloads.write(workloads.WORKLOADS[options.workload], Path(folder))
        for _ in range(options.runs):
            for name, privacy in PRIVACY.items():
                sets = [f"run.store={folder}/runs", "evaluate.every=0"]
                sets += [f"privacy.{key}={value}" for key, value in privacy.items()]
                history = simulate(run_file.load(files.run_file, sets)).history
                seconds[name] += [record.seconds for record in history[1:-1]]
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    times = {name: value / medians["none"] for name, value in medians.items()}
    return {
        "workload": options.workload,
        "runs": options.runs,
        "load": os.getloadavg()[0],
        "versions": versions(),
        "seconds_a_round": {name: round(value, 4) for name, value in medians.items()},
        "times_plain": {name: round(value, 2) for name, value in times.items()},
        "goal": GOAL,
        "met": times["example"] <= GOAL,
    }


def show(result: dict[str, Any]) -> None:
    """Prints the figures."""
    print(f"{result['workload']}, medians of {result['runs']} runs, load {result['load']:.1f}")
    for name, value in result["seconds_a_round"].items():
        print(f"unit {name:8} {value:.3f} s a round, {result['times_plain'][name]:.2f} times plain")
    print(f"goal for examples: {result['goal']:.1f}, {'met' if result['met'] else 'MISSED'}")


def main() -> None:
    """From the command line."""
    show(measure(parser().parse_args()))


if __name__ == "__main__":
    main()
