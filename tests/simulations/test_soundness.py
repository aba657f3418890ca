"""Every task, unit, secure aggregation and family: it works for a round, or is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from umbel.core.errors import InputError, RefusedError
from umbel.simulations.simulate import simulate
from umbel.simulations.soundness import FILE, cells, run_of, soundness, tasks

COUPLED = ("simclr", "moco", "barlow-twins", "dino", "byol", "simsiam")
TABLE = json.loads(FILE.read_text(encoding="utf-8"))


def test_every_kind_of_task_has_its_row() -> None:
    from umbel.core import registry

    assert {name.partition(",")[0] for name in TABLE["tasks"]} == registry.known("tasks").keys()


def test_what_the_table_must_say() -> None:
    def refused(unit: str) -> set[str]:
        return {name for name, found in TABLE["tasks"].items() if found[unit]}

    unsound = {
        "few-shot",
        "clip",
        "grpo, scale of the batch",
        "ppo, whitening",
        "classification, BatchNorm",
        *(f"self-supervised, {name}" for name in COUPLED),
        *("a2c", "dqn", "dyna", "ppo-control", "q-learning", "reinforce"),
    }
    assert refused("none") == set()
    assert refused("example") == unsound | {"ppo, adaptive KL"}
    assert refused("client") == {"classification, BatchNorm", "ppo, adaptive KL"}
    for family, units in TABLE["families"].items():
        for unit, (plain, secure) in units.items():
            assert bool(secure) == (family == "robust")
            assert bool(plain) == (family == "robust" and unit == "client")


@pytest.mark.slow
def test_the_table_is_up_to_date(tmp_path: Path) -> None:
    assert soundness(tmp_path) == TABLE


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLE["tasks"])
def test_every_cell_does_what_the_table_says(name: str, tmp_path: Path) -> None:
    sections = tasks(tmp_path)[name]
    for cell in cells([name]):
        run = run_of(cell, sections, tmp_path / "runs")
        reason = TABLE["families"][cell.family][cell.unit][cell.secure]
        if TABLE["tasks"][name][cell.unit] or reason:
            with pytest.raises((InputError, RefusedError)):
                simulate(run)
            continue
        outcome = simulate(run)
        assert (outcome.status, outcome.rounds) == ("finished", 1), cell
        assert len(outcome.history[0].participants) == 4, cell
