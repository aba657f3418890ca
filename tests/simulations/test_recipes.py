"""Every recipe states the figure that it reaches, in its first lines and in the docs, and does.

Those that are quick are run whole by ``make check``, the others by ``make recipes``; of these
``make check`` runs a round, here or beside what else it tests of their tasks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import pytest

from umbel.core.run_file import RunFile, load
from umbel.server.records import RoundRecord
from umbel.server.store import RunStore
from umbel.simulations.benchmarks.self_supervised import few_labels
from umbel.simulations.prepare import prepare
from umbel.simulations.simulate import Outcome, simulate

RECIPES = files("umbel.simulations.recipes")
NAMES = sorted(f.name[:-5] for f in RECIPES.iterdir() if f.name.endswith(".toml"))
PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"

FEW_LABELS = "few labels"
"""Not of the record: what logistic regression on the encoder gets right with five labels each."""


class Figure(NamedTuple):
    """What a recipe states.

    Args:
        metric: of the record.
        stated: in the recipe's first lines and in the docs.
        at_least: the bound of the test: a little on the worse side of what is stated, because the
            last bits of a run differ from processor to processor.
        at_most: the same, where less is better.
        best: of all rounds, not of the last; the run ends when it is reached.
        quick: a few seconds.
    """

    metric: str
    stated: str
    at_least: float = -math.inf
    at_most: float = math.inf
    best: bool = False
    quick: bool = False

    def holds(self, value: float) -> bool:
        return self.at_least <= value <= self.at_most


FIGURES = {
    "audit": [Figure("epsilon", "2", at_most=2, quick=True)],
    "cartpole-a2c": [Figure("return", "450", 450, best=True)],
    "cartpole-cloning": [Figure("return", "450", 450, best=True, quick=True)],
    "cartpole-dqn": [Figure("return", "200", 200, best=True)],
    "cartpole-ppo": [Figure("return", "400", 400, best=True, quick=True)],
    "cartpole-reinforce": [Figure("return", "450", 450, best=True)],
    "digits-autoencoder": [Figure("loss", "0.017", at_most=0.018, quick=True)],
    "digits-clip": [Figure("zero_shot", "0.94", 0.92)],
    "digits-dirichlet": [Figure("accuracy", "0.93", 0.92, quick=True)],
    "digits-gan": [Figure("discrepancy", "0.02", at_most=0.03)],
    "digits-kmeans": [
        Figure("purity", "0.78", 0.75, quick=True),
        Figure("inertia", "2.61", 2.56, 2.66, quick=True),
    ],
    "digits-simclr": [Figure(FEW_LABELS, "0.68", 0.64)],
    "digits-vae": [Figure("loss", "25.1", at_most=25.4, quick=True)],
    "dpo": [Figure("loss", "0.35", at_most=0.4)],
    "grid-dyna": [Figure("return", "1", 1, best=True, quick=True)],
    "grid-q-learning": [Figure("return", "1", 1, best=True, quick=True)],
    "grpo": [Figure("reward", "0.7", 0.7, best=True), Figure("kl", "7", 0, 7)],
    "heart-disease": [Figure("accuracy", "0.70", 0.68, quick=True)],
    "mnist-2nn": [Figure("accuracy", "0.97", 0.97)],
    "ppo": [Figure("reward", "0.7", 0.7, best=True), Figure("kl", "7.5", 0, 7.5)],
    "reward": [Figure("accuracy", "0.9", 0.9, quick=True)],
    "shakespeare-base": [Figure("loss", "2.3", at_most=2.35)],
    "shakespeare-lora": [Figure("loss", "2.19", at_most=2.2)],
}

FILES = {"heart-disease", "mnist-2nn", "shakespeare-base", "shakespeare-lora"}
"""Recipes on data that do not come with a package."""

FIRST = {"shakespeare-lora": "shakespeare-base"}
"""What a recipe goes on from."""


def recipe(name: str, store: Path, *more: str) -> RunFile:
    return load(str(RECIPES.joinpath(f"{name}.toml")), [f"run.store={store}", *more])


def test_every_recipe_states_its_figure_in_its_first_lines_and_in_the_docs() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    stated = {row.split("`")[1]: row.split("|")[-2] for row in reversed(rows)}
    assert sorted(stated) == NAMES == sorted(FIGURES)
    for name, figures in FIGURES.items():
        text = RECIPES.joinpath(f"{name}.toml").read_text().split("\n\n")[0]
        first = " ".join(line.removeprefix("#") for line in text.splitlines())
        assert figures[0].stated in stated[name], name
        for figure in figures:
            assert figure.stated.rstrip("0") in first or figure.metric == "epsilon", name


def reached(name: str, store: Path, data: list[str]) -> Iterator[tuple[Figure, float]]:
    """Runs a recipe: each figure that it states, and what it came to."""
    if name in FIRST:
        simulate(recipe(FIRST[name], store, *data))
    wanted = FIGURES[name]

    best = [figure for figure in wanted if figure.best]

    def enough(record: RoundRecord) -> str:
        found = all(f.holds(record.metrics.get(f.metric, math.nan)) for f in best)
        return "reached" if best and found else ""

    run = recipe(name, store, "run.processes=0", *data)
    outcome = simulate(run, until=enough)
    assert outcome.status == "finished"
    for figure in wanted:
        if figure.best:
            yield figure, max(r.metrics[figure.metric] for r in outcome.history if r.metrics)
        else:
            yield figure, value(run, store, outcome, figure.metric)


def value(run: RunFile, store: Path, outcome: Outcome, metric: str) -> float:
    if metric == "epsilon":
        assert outcome.privacy is not None
        return float(outcome.privacy["epsilon"])
    if metric == FEW_LABELS:
        last = RunStore(store).latest(outcome.run_id)
        assert last is not None
        return few_labels(prepare(run), last.model)
    return outcome.metrics[metric]


def marked(name: str) -> object:
    marks = [pytest.mark.slow]
    if not all(figure.quick for figure in FIGURES[name]):
        marks.append(pytest.mark.recipes)
    if name in FILES:
        marks.append(pytest.mark.data)
    return pytest.param(name, marks=marks)


@pytest.mark.parametrize("name", [marked(name) for name in NAMES])
def test_a_recipe_reaches_what_it_states(
    tmp_path: Path, name: str, request: pytest.FixtureRequest
) -> None:
    data = [f"data.path={request.getfixturevalue('data_root')}"] if name in FILES else []
    for figure, found in reached(name, tmp_path, data):
        assert figure.holds(found), (figure, found)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "cartpole-a2c",
        "cartpole-dqn",
        "cartpole-reinforce",
        "digits-clip",
        "digits-gan",
        "digits-simclr",
    ],
)
def test_a_recipe_trains(tmp_path: Path, name: str) -> None:
    outcome = simulate(recipe(name, tmp_path, "run.rounds=1", "run.processes=0"))
    assert outcome.status == "finished"
    assert outcome.metrics
    assert all(math.isfinite(value) for value in outcome.metrics.values())
