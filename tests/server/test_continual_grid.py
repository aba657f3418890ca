"""Runs over experiences at remote clients, who deal and remember their own examples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers.local_grid import LocalGrid

from umbel.client.flower.app import app as client_app
from umbel.core.errors import InputError
from umbel.core.run_file import RunFile, resolve
from umbel.server.continual import kept_report
from umbel.server.flower.grid import GridFederation
from umbel.server.flower.secure_grid import secured
from umbel.server.records import RoundRecord
from umbel.server.serve import serve
from umbel.server.store import RunStore
from umbel.simulations.simulate import simulate

CLIENTS = 3


def run_file(store: Path, **sections: Any) -> RunFile:
    whole: dict[str, Any] = {
        "run": {"rounds": 6, "seed": 3, "store": str(store), "checkpoint_seconds": 0.0},
        "data": {
            "name": "digits",
            "holdout": 0.0,
            "client_holdout": 0.3,
            "split": {"kind": "iid", "clients": CLIENTS},
        },
        "task": {"kind": "classification", "model": {"name": "mlp", "hidden": [8]}},
        "client": {"lr": 0.05, "local_steps": 4, "device": "cpu"},
        "evaluate": {"every": 2},
        "continual": {"experiences": 3, "defence": "naive"},
    }
    for section, keys in sections.items():
        whole[section] = {**whole.get(section, {}), **keys}
    return resolve(whole)


def served(run: RunFile, resume: str | None = None, stop: int = 0) -> str:
    """The run at remote clients; its id."""
    configs = [{"partition-id": i, "num-partitions": CLIENTS} for i in range(CLIENTS)]
    inner = GridFederation(LocalGrid(client_app, configs), run, sites=CLIENTS)
    federation = secured(inner, None)
    started: list[str] = []

    def cut(record: RoundRecord) -> None:
        assert not record.failures
        if record.round == stop:
            raise KeyboardInterrupt

    try:
        serve(
            federation.run,
            federation,
            federation.info,
            engine="test",
            resume=resume,
            on_start=started.append,
            on_round=cut,
        )
    except KeyboardInterrupt:
        assert stop
    return started[0]


@pytest.mark.parametrize(
    ("defence", "continual"),
    [
        ("naive", {"head": "growing", "order": "shuffled", "reference": True}),
        ({"name": "replay", "per_class": 3, "choice": "herding"}, {"by": "rotation"}),
        ({"name": "ewc", "strength": 50.0, "examples": 5}, {"head": "multi"}),
        ({"name": "der", "per_class": 3}, {"experiences": 2, "order": "staggered"}),
        ({"name": "ncm", "per_class": 3}, {}),
        ({"name": "adapters", "rank": 2}, {"head": "multi"}),
    ],
)
def test_remote_clients_learn_what_simulated_ones_do(
    tmp_path: Path, defence: Any, continual: dict[str, Any]
) -> None:
    section = {**continual, "defence": defence}
    here = simulate(run_file(tmp_path / "here", continual=section), engine="sequential")
    run = run_file(tmp_path / "there", continual=section)
    run_id, store = served(run), RunStore(run.run.store)
    assert here.model is not None
    there = safetensors.torch.load_file(store.model_path(run_id))
    for name, tensor in safetensors.torch.load_file(here.model).items():
        torch.testing.assert_close(there[name], tensor, rtol=0, atol=1e-5)
    # The matrices, too: of all clients together, and of each.
    found, wanted = kept_report(store.folder / run_id), json.loads(json.dumps(here.continual))
    assert found.keys() == wanted.keys()
    for ours, theirs in [
        (found, wanted),
        *((found["per_client"][c], wanted["per_client"][c]) for c in wanted["per_client"]),
    ]:
        for figure in ours.keys() - {"per_client"}:
            left, right = (torch.tensor(x[figure], dtype=torch.float64) for x in (ours, theirs))
            torch.testing.assert_close(left, right, rtol=0, atol=1e-6, equal_nan=True)


def test_a_run_goes_on_in_the_midst_of_a_stage_with_what_earlier_ones_left(tmp_path: Path) -> None:
    der = {"defence": {"name": "der", "per_class": 3, "choice": "herding"}}
    run = run_file(tmp_path, continual=der)
    whole = served(run)
    cut = served(run, stop=5)
    assert served(run, resume=cut) == cut
    store = RunStore(run.run.store)
    left, right = (safetensors.torch.load_file(store.model_path(i)) for i in (whole, cut))
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert kept_report(store.folder / whole) == kept_report(store.folder / cut)


def test_under_masks_the_server_sees_no_importance_but_all_clients_together(
    tmp_path: Path,
) -> None:
    ewc = {"head": "multi", "defence": {"name": "ewc", "strength": 50.0, "examples": 5}}
    even = {"weights": "uniform"}
    plain = simulate(run_file(tmp_path, continual=ewc, strategy=even), engine="sequential")
    masks = {"enabled": True, "min_cohort": CLIENTS}
    run = run_file(tmp_path, continual=ewc, strategy=even, secure_aggregation=masks)
    store, run_id = RunStore(run.run.store), served(run)
    found = safetensors.torch.load_file(store.model_path(run_id))
    assert plain.model is not None
    for name, tensor in safetensors.torch.load_file(plain.model).items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-3)
    report = kept_report(store.folder / run_id)
    assert torch.tensor(report["matrix"]).shape == (3, 3)
    assert report["per_client"] == {}
    with pytest.raises(InputError, match="no bound"):
        served(run_file(tmp_path, continual={"defence": "ncm"}, secure_aggregation=masks))


def test_the_values_of_a_column_are_stated_where_nobody_sees_them_all(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    arrays = {"x": generator.normal(size=(90, 4)), "y": generator.integers(0, 3, 90)}
    year, owner = np.arange(90) % 3 + 2019, np.repeat(["a", "b", "c"], 30)
    np.savez(tmp_path / "own.npz", **arrays, year=year, client=owner)  # type: ignore[arg-type]
    data = {"name": "npz", "path": str(tmp_path / "own.npz"), "columns": ["year"]}
    data |= {"split": {"kind": "natural"}, "classes": 3}
    stages = {"by": "column", "column": "year"}
    with pytest.raises(InputError, match="nobody sees all values"):
        served(run_file(tmp_path / "no", data=data, continual=stages))
    stages |= {"values": [2019, 2020, 2021]}
    run = run_file(tmp_path / "yes", data=data, continual=stages)
    assert len(kept_report(RunStore(run.run.store).folder / served(run))["matrix"]) == 3
