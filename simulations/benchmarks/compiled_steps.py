"""What compiled steps bring: the trial of a run so long that they are tried, model by model.

    python -m umbel.simulations.benchmarks.compiled_steps

Milliseconds of one client's first two steps, least of four, by plan: with every kernel's best chunk
as it is, and with its step compiled. One thread.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from umbel.core.payloads import TrainPlan
from umbel.core.run_file import RunFile, load
from umbel.simulations.benchmarks.parts.workloads import GPU, WORKLOADS, write
from umbel.simulations.engines.vectorised import Vectorised, vectorised
from umbel.simulations.prepare import prepare

ROUNDS = 10**7
"""So many that every trial finds the run long."""


def trial(run: RunFile) -> dict[str, Any]:
    """The record of the plan that the first round chose."""
    ready = prepare(run)
    engine = vectorised(run, ready.data, ready.task, ready.strategy.client, print)
    assert isinstance(engine, Vectorised)
    clients = engine.clients()[:100]
    for _ in engine.train(TrainPlan(1, clients, ready.model(), len(clients))):
        break
    engine.close()
    return engine.plan_record()


def main() -> None:
    """Prints the table."""
    every = {**WORKLOADS, **GPU}
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workloads", nargs="+", choices=sorted(every), default=["W1", "W2"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder  # what an earlier trial found is no measurement
        for name in options.workloads:
            files = write(every[name], Path(folder) / name)
            run = load(files.run_file, [f"run.rounds={ROUNDS}", "run.processes=0"])
            start = time.perf_counter()
            record = trial(run)
            print(f"{name}: {time.perf_counter() - start:.0f} s, chosen {record['plan']}")
            for plan, seconds in sorted(record["seconds_per_client"].items()):
                print(f"  {plan:32}{1e3 * seconds:12.3f}")
            for plan, why in record["refused"].items():
                print(f"  {plan:32}{why}")


if __name__ == "__main__":
    main()
