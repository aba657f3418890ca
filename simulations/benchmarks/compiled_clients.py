"""Where ``[client] compile`` pays: rounds of recipes, client by client, with and without it.

    python -m umbel.simulations.benchmarks.compiled_clients

Rounds of both kinds alternate in one process, on one thread; medians of all but the first. One
client trains a round, as at a site.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from importlib.resources import files

import torch

from umbel.client.training import ClientRuntime
from umbel.core.run_file import load
from umbel.simulations.prepare import prepare

RECIPES = ("heart-disease", "mnist-2nn", "digits-vae", "digits-simclr", "shakespeare-base")


def main() -> None:
    """Prints the table."""
    folder = files("umbel.simulations") / "recipes"
    known = sorted(p.name.removesuffix(".toml") for p in folder.iterdir() if ".toml" in p.name)
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipes", nargs="+", choices=known, default=list(RECIPES))
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, load {os.getloadavg()[0]:.1f}; seconds of a client's round")
    print(f"{'recipe':24}{'plain':>10}{'compiled':>10}{'ratio':>8}{'first, compiled':>18}")
    with tempfile.TemporaryDirectory() as empty:  # what was compiled before is no measurement
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = empty
        for recipe in options.recipes:
            row(recipe, str(folder / f"{recipe}.toml"), options.rounds)


def row(recipe: str, path: str, rounds: int) -> None:
    """Trains the largest client of a recipe, round by round."""
    both = ["client.compile=false"], ["client.compile=true"]
    ready = prepare(load(path, ["client.device=cpu", *both[0]]))
    largest = int(ready.data.train_holdings.sizes().argmax())
    examples, name = ready.data.train_part(largest), ready.data.names[largest]
    runtimes = [
        ClientRuntime(load(path, ["client.device=cpu", *one]), ready.task, ready.strategy.client)
        for one in both
    ]
    seconds: list[list[float]] = [[], []]
    for number in range(1, rounds + 1):
        for runtime, found in zip(runtimes, seconds, strict=True):
            start = time.perf_counter()
            runtime.learn(number, name, examples, ready.model())
            found.append(time.perf_counter() - start)
    plain, compiled = (statistics.median(found[1:]) for found in seconds)
    first = seconds[1][0]
    print(f"{recipe:24}{plain:>10.3f}{compiled:>10.3f}{plain / compiled:>8.2f}{first:>18.1f}")


if __name__ == "__main__":
    main()
