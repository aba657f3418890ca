"""A curriculum: its pace, its choice, and that engines make the same one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from umbel.core.errors import InputError, RefusedError
from umbel.core.run_file import Curriculum, resolve
from umbel.simulations.prepare import prepare
from umbel.simulations.simulate import Outcome, simulate
from umbel.tasks.collect import Moment
from umbel.tasks.curriculum import chosen, share


def run(store: Path, curriculum: dict[str, Any] | None, plan: str = "", **sections: Any) -> Any:
    table: dict[str, Any] = {
        "run": {"rounds": 4, "seed": 3, "store": str(store), "processes": 0},
        "data": {
            "name": "breast-cancer",
            "split": {"kind": "dirichlet", "clients": 4, "alpha": 0.5, "minimum": 12},
        },
        "task": {"kind": "classification", "model": {"name": "mlp", "hidden": [6]}},
        "client": {"device": "cpu", "batch_size": 8},
        "evaluate": {"every": 0},
        **sections,
    }
    if curriculum is not None:
        table["task"]["curriculum"] = curriculum
    if plan:
        table["run"]["engine_plan"] = plan
    return resolve(table)


def final(outcome: Outcome) -> dict[str, torch.Tensor]:
    assert outcome.model is not None
    assert not any(record.failures for record in outcome.history)
    return safetensors.torch.load_file(outcome.model)


def test_a_share_of_one_is_a_run_without_a_curriculum(tmp_path: Path) -> None:
    plain = final(simulate(run(tmp_path, None), engine="sequential"))
    whole = final(simulate(run(tmp_path, {"start": 1.0}), engine="sequential"))
    assert all(torch.equal(plain[n], whole[n]) for n in plain)


@pytest.mark.parametrize("plan", ["lean", "vmap"])
def test_engines_agree(tmp_path: Path, plan: str) -> None:
    section = {"start": 0.4, "full": 0.8}
    alone = final(simulate(run(tmp_path, section), engine="sequential"))
    said: list[str] = []
    together = final(simulate(run(tmp_path, section, plan), announce=said.append))
    assert not said
    plain = final(simulate(run(tmp_path, None), engine="sequential"))
    for name, tensor in alone.items():
        torch.testing.assert_close(together[name], tensor, rtol=0, atol=1e-4)
    assert any(not torch.allclose(plain[n], alone[n], atol=1e-3) for n in plain)


def test_a_client_trains_on_the_easiest_of_each_class(tmp_path: Path) -> None:
    prepared = prepare(run(tmp_path, {"start": 0.25}))
    task, held = prepared.task, prepared.data.train_part(0)
    assert task.collect is not None
    with torch.no_grad():
        made = task.collect(prepared.module.eval(), held, Moment(0, 1, 4))
        columns = {n: torch.from_numpy(np.array(c)) for n, c in held.items()}
        losses = task.losses(prepared.module, columns).numpy()
        last = task.collect(prepared.module, held, Moment(0, 4, 4))
    for label in np.unique(held["y"]):
        here = held["y"] == label
        count = int(np.ceil(here.sum() / 4))
        assert (made["y"] == label).sum() == count
        bound = np.sort(losses[here])[count - 1]
        wanted = held["x"][here & (losses <= bound)]
        np.testing.assert_array_equal(made["x"][made["y"] == label], wanted)
    np.testing.assert_array_equal(last["x"], held["x"])


def test_shares_grow_from_the_start_to_all() -> None:
    for pace in ("linear", "root", "exponential"):
        section = Curriculum(start=0.25, full=0.5, pace=pace)  # type: ignore[arg-type]
        shares = [share(section, number, 20) for number in range(1, 21)]
        assert shares[0] == pytest.approx(0.25)
        assert shares == sorted(shares)
        assert shares[9] < 1.0
        assert shares[10:] == [pytest.approx(1.0)] * 10
    half = [
        share(Curriculum(start=0.25, full=1.0, pace=pace), 6, 10)  # type: ignore[arg-type]
        for pace in ("linear", "root", "exponential")
    ]
    assert half == [pytest.approx(v) for v in (0.625, ((1 + 0.25**2) / 2) ** 0.5, 0.5)]


def test_ties_and_both_orders() -> None:
    losses, labels = np.array([3.0, 1.0, 1.0, np.inf, 0.0]), np.array([0, 0, 0, 0, 1])
    assert chosen(losses, labels, 0.5, hard=False).tolist() == [1, 2, 4]
    assert chosen(losses, labels, 0.5, hard=True).tolist() == [0, 3, 4]
    assert chosen(losses, labels, 1.0, hard=False).tolist() == [0, 1, 2, 3, 4]
    assert len(chosen(np.arange(10.0), np.zeros(10, np.int64), 0.1 + 0.2, hard=False)) == 3


def test_what_a_curriculum_does_not_go_with(tmp_path: Path) -> None:
    few = {"kind": "few-shot", "ways": 2, "shots": 1, "queries": 1, "curriculum": {}}
    with pytest.raises(InputError, match="draws its own"):
        prepare(run(tmp_path, None, task=few))
    private = {"unit": "example", "noise_multiplier": 1.0, "clip_norm": 1.0}
    with pytest.raises((InputError, RefusedError), match="made with the model"):
        prepare(run(tmp_path, {}, privacy=private))
