"""Recipes of groups and captions reach the figures that they state."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from umbel.core.run_file import load
from umbel.simulations.simulate import simulate


def figures(name: str, store: Path, *more: str) -> Any:
    recipe = str(files("umbel.simulations.recipes").joinpath(f"{name}.toml"))
    return simulate(load(recipe, [f"run.store={store}", *more])).metrics


@pytest.mark.slow
def test_k_means_under_masks_finds_digits(tmp_path: Path) -> None:
    found = figures("digits-kmeans", tmp_path)
    assert found["purity"] >= 0.75
    assert found["inertia"] == pytest.approx(2.61, abs=0.05)
