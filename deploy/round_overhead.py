"""What a round costs beside its training: three sites on this machine, TLS and authentication on.

``python -m umbel.deploy.round_overhead`` runs the same tiny model twice: on Umbel's own server and
sites, and on stock Flower's SuperLink and SuperNodes with the same ServerApp and ClientApp. A round
trains and evaluates at each site. It prints one JSON object: seconds a round, without the first,
and how busy the machine was.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from umbel.core.run_file import RunFile, resolve
from umbel.deploy.loopback import Loopback, Site
from umbel.deploy.network import Network
from umbel.server.store import RunStore

NAMES = ("a", "b", "c")
EXAMPLES, FEATURES = 60, 30


def write_data(folder: Path) -> list[Site]:
    """A file of random examples for each site."""
    generator = np.random.default_rng(0)
    sites = []
    for name in NAMES:
        x = generator.normal(size=(EXAMPLES, FEATURES)).astype(np.float32)
        y = (x[:, 0] > 0).astype(np.int64)
        cut = EXAMPLES // 2
        np.savez(
            folder / f"{name}.npz",
            x=x[:cut],
            y=y[:cut],
            x_test=x[cut:],
            y_test=y[cut:],
            client=np.repeat([name], cut),
            client_test=np.repeat([name], EXAMPLES - cut),
        )
        sites.append(Site(name, folder / f"{name}.npz"))
    return sites


def tiny_run(rounds: int) -> RunFile:
    """Logistic regression, one step a round, evaluated in each."""
    return resolve(
        {
            "run": {"name": "overhead", "rounds": rounds},
            "data": {"name": "npz", "classes": 2},
            "task": {"kind": "classification", "model": "logistic"},
            "client": {"batch_size": "full", "lr": 0.1, "device": "cpu"},
        }
    )


def umbel(folder: Path, rounds: int) -> list[float]:
    """Seconds of each round on Umbel's own server and sites."""
    with Network(folder / "umbel", write_data(folder)) as network:
        job = network.finish(network.submit(tiny_run(rounds)), seconds=1800)
        return _seconds(RunStore(network.server.store), job.run_id)


def flower(folder: Path, rounds: int) -> list[float]:
    """The same on stock Flower's SuperLink and SuperNodes."""
    with Loopback(folder / "flower", write_data(folder)) as federation:
        run = tiny_run(rounds)
        run_id = federation.run(run, report=lambda line: None)
        return _seconds(federation.store(run), run_id)


def _seconds(store: RunStore, run_id: str) -> list[float]:
    found = [record.seconds for record in store.history(run_id)]
    store.close()
    return found


def _summary(seconds: list[float]) -> dict[str, Any]:
    later = sorted(seconds[1:]) or seconds
    return {
        "rounds": len(seconds),
        "first": round(seconds[0], 3),
        "median": round(statistics.median(later), 3),
        "fastest": round(later[0], 3),
        "slowest": round(later[-1], 3),
    }


def main() -> None:
    """The entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=20, help="on Umbel's own server")
    parser.add_argument("--flower-rounds", type=int, default=4, help="on Flower's; 0: leave out")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    result: dict[str, Any] = {"sites": len(NAMES), "cores": os.cpu_count()}
    with tempfile.TemporaryDirectory(prefix="umbel-overhead-") as name:
        result["umbel"] = _summary(umbel(Path(name), options.rounds))
        if options.flower_rounds:
            result["flower"] = _summary(flower(Path(name), options.flower_rounds))
    result["load"] = round(os.getloadavg()[0], 1)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
