"""Runs over experiences at remote clients, who deal and remember their own examples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from helpers.local_grid import LocalGrid

from umbel.client.flower.app import app as client_app
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
