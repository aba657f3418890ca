"""Digits, a class or two a client, few labels: what federation buys an encoder without labels.

    python -m umbel.simulations.benchmarks.self_supervised

For each method: the accuracy of logistic regression on five labelled images of each digit (mean
over 20 draws of them), given the encoder untrained, trained by one client alone (the mean of the
first three), by the federation, and on all examples in one place. That is given as many steps in a
row as one client takes; `umbel bench baselines digits-simclr` gives it the steps of all.
"""

from __future__ import annotations

import argparse
import tempfile
import tomllib
from importlib.resources import files
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from sklearn.linear_model import LogisticRegression

from umbel.client.training import ClientRuntime
from umbel.core import registry
from umbel.core.run_file import RunFile, resolve
from umbel.core.trees import Model
from umbel.server.store import RunStore
from umbel.simulations.benchmarks.baselines import alone
from umbel.simulations.prepare import Prepared, prepare
from umbel.simulations.simulate import simulate

LABELS, DRAWS, ALONE = 5, 20, 3

PATCHED = ("mae", "i-jepa")
"""Methods that train a ``vit``, whose codes are as long as the others'."""


def run_file(method: str, rounds: int | None, store: str, seed: int, pooled: bool) -> RunFile:
    """The recipe, with another method; ``pooled``: all examples at one client."""
    recipe = files("umbel.simulations.recipes").joinpath("digits-simclr.toml").read_text()
    table: dict[str, Any] = tomllib.loads(recipe)
    table["run"] |= {"store": store, "seed": seed}
    if rounds is not None:
        table["run"]["rounds"] = rounds
    if method != table["task"]["method"]:
        table["task"]["method"] = method
    if method in PATCHED:
        width = table["task"]["embedding"]
        table["task"]["model"] = {"name": "vit", "patch": 2, "width": width, "heads": 2}
    if pooled:
        table["data"]["split"] = {"kind": "iid", "clients": 1}
        table["strategy"]["cohort"] = 1
    table["evaluate"] |= {"every": 0}
    return resolve(table)


def few_labels(prepared: Prepared, model: Model) -> float:
    """The accuracy on the test part of a classifier that saw ``LABELS`` images of each class."""
    data = prepared.data
    module = ClientRuntime(prepared.run, prepared.task, prepared.strategy.client).module(model)
    test, encoder = data.test, module.eval().get_submodule("encoder")
    assert test is not None
    with torch.no_grad():
        seen, asked = (
            encoder(torch.from_numpy(x.copy())).numpy() for x in (data.train["x"], test["x"])
        )
    mean, deviation = seen.mean(0), seen.std(0) + 1e-6
    seen, asked = (seen - mean) / deviation, (asked - mean) / deviation
    labels = data.train["y"]
    scores: list[float] = []
    for draw in range(DRAWS):
        generator = np.random.default_rng(draw)
        index = np.concatenate(
            [
                generator.choice(np.flatnonzero(labels == c), LABELS, False)
                for c in np.unique(labels)
            ]
        )
        probe = LogisticRegression(max_iter=500).fit(seen[index], labels[index])
        scores.append(probe.score(asked, test["y"]))
    return float(np.mean(scores))


def trained(run: RunFile) -> Model:
    """The model that a run ends with."""
    outcome = simulate(run)
    saved = RunStore(run.run.store).latest(outcome.run_id)
    assert saved is not None
    return saved.model


def row(method: str, rounds: int | None, seed: int) -> tuple[float, float, float, float]:
    """The accuracy untrained, of one client's encoder, of the federation's, and of the pooled."""
    with tempfile.TemporaryDirectory() as store:
        prepared = prepare(run_file(method, rounds, store, seed, pooled=False))
        untrained = few_labels(prepared, prepared.model())
        runtime = ClientRuntime(prepared.run, prepared.task, prepared.strategy.client)
        single = [few_labels(prepared, alone(runtime, prepared, c)) for c in range(ALONE)]
        federated = few_labels(prepared, trained(prepared.run))
        pooled = few_labels(prepared, trained(run_file(method, rounds, store, seed, pooled=True)))
        return untrained, float(np.mean(single)), federated, pooled


def main() -> None:
    """Prints the table."""
    methods = list(registry.known("methods"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=None, help="default: the recipe's")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", nargs="*", choices=methods, default=methods)
    given = parser.parse_args()
    columns = "untrained", "one client", "federated", "in one place"
    table = Table("digits, 5 labels a class", *columns)
    for method in given.only:
        table.add_row(method, *(f"{v:.3f}" for v in row(method, given.rounds, given.seed)))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
