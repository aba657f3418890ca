"""Digits, clients with few classes, few labels: what federation buys an encoder without labels.

    python -m umbel.simulations.benchmarks.self_supervised

For each method: the accuracy of logistic regression on five labelled images of each digit (mean
over 20 draws of them), given the encoder untrained, trained by one client alone (the mean of the
first three), and by the federation. One client trains for as many epochs as it does in the
federation.
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
from umbel.core.run_file import RunFile, resolve
from umbel.core.trees import Model, map_tree
from umbel.server.store import RunStore
from umbel.simulations.prepare import Prepared, prepare
from umbel.simulations.simulate import simulate

METHODS = ("simclr", "byol", "simsiam", "barlow-twins")
LABELS, DRAWS, ALONE = 5, 20, 3


def run_file(method: str, rounds: int, store: str, seed: int) -> RunFile:
    """The recipe, with another method."""
    recipe = files("umbel.simulations.recipes").joinpath("digits-simclr.toml").read_text()
    table: dict[str, Any] = tomllib.loads(recipe)
    table["run"] |= {"rounds": rounds, "store": store, "seed": seed}
    table["task"] |= {"method": method}
    table["evaluate"] |= {"every": 0}
    return resolve(table)


def few_labels(prepared: Prepared, model: Model) -> float:
    """The accuracy on the test part of a classifier that saw ``LABELS`` images of each class."""
    data = prepared.data
    module = ClientRuntime(prepared.run, prepared.task, prepared.strategy.client).module(model)
    test, width = data.test, prepared.run.task.parameters()["embedding"]
    assert test is not None
    with torch.no_grad():
        module.eval()
        seen, asked = (
            module(torch.from_numpy(x.copy()))[:, :width].numpy()
            for x in (data.train["x"], test["x"])
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


def alone(prepared: Prepared, client: int) -> Model:
    """The model that one client arrives at by itself."""
    runtime = ClientRuntime(prepared.run, prepared.task, prepared.strategy.client)
    model, name = prepared.model(), prepared.data.names[client]
    examples = prepared.data.train_part(client)
    for number in range(1, prepared.run.run.rounds + 1):
        delta = map_tree(lambda d: d[0], runtime.train(number, name, examples, model).delta)
        model = Model(*({n: t + delta[n] for n, t in tree.items()} for tree in model))
    return model


def row(method: str, rounds: int, seed: int) -> tuple[float, float, float]:
    """The accuracy untrained, of one client's encoder, and of the federation's."""
    with tempfile.TemporaryDirectory() as store:
        prepared = prepare(run_file(method, rounds, store, seed))
        outcome = simulate(prepared.run)
        federated = RunStore(store).latest(outcome.run_id)
        assert federated is not None
        single = [few_labels(prepared, alone(prepared, c)) for c in range(ALONE)]
        untrained = few_labels(prepared, prepared.model())
        return untrained, float(np.mean(single)), few_labels(prepared, federated.model)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", nargs="*", choices=METHODS, default=METHODS)
    given = parser.parse_args()
    table = Table("digits, 5 labels a class", "untrained", "one client", "federated")
    for method in given.only:
        table.add_row(method, *(f"{v:.3f}" for v in row(method, given.rounds, given.seed)))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
