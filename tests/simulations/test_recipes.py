"""Every recipe is listed with what it reaches, and those that no other test runs do run."""

from __future__ import annotations

import math
from importlib.resources import files
from pathlib import Path

import pytest

from umbel.core.run_file import load
from umbel.simulations.simulate import simulate

RECIPES = files("umbel.simulations.recipes")
NAMES = sorted(f.name[:-5] for f in RECIPES.iterdir() if f.name.endswith(".toml"))
PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"


def test_every_recipe_has_its_row_in_the_docs() -> None:
    rows = [line.split("`")[1] for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    assert sorted(set(rows)) == NAMES


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "cartpole-a2c",
        "cartpole-dqn",
        "cartpole-reinforce",
        "digits-autoencoder",
        "digits-clip",
        "digits-dirichlet",
        "digits-gan",
        "digits-simclr",
        "digits-vae",
    ],
)
def test_a_recipe_trains(tmp_path: Path, name: str) -> None:
    recipe = load(str(RECIPES.joinpath(f"{name}.toml")), [f"run.store={tmp_path}"])
    short = {"rounds": 1, "processes": 0}
    outcome = simulate(recipe.model_copy(update={"run": recipe.run.model_copy(update=short)}))
    assert outcome.status == "finished"
    assert outcome.metrics
    assert all(math.isfinite(value) for value in outcome.metrics.values())
