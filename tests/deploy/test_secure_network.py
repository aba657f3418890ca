"""Secure aggregation as it is deployed: pinned keys from provisioning, real processes, real TLS."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import safetensors.torch
import torch
from sklearn.datasets import load_breast_cancer

from umbel.client.site_ledger import read
from umbel.core import audit_log
from umbel.core.run_file import RunFile, resolve
from umbel.deploy.loopback import Site
from umbel.deploy.network import Network
from umbel.privacy.accounting import rdp_epsilon
from umbel.privacy.mechanisms import Gaussian
from umbel.server.store import RunStore
from umbel.simulations.simulate import simulate

pytestmark = [
    pytest.mark.flower,
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc"),
]

SITES = ("aarhus", "basel", "como")


def save(path: Path, names: tuple[str, ...]) -> None:
    """The patients of these hospitals alone, the last 30 of each as its test part."""
    x, y = load_breast_cancer(return_X_y=True)
    x = ((x - x.mean(0)) / x.std(0)).astype(np.float32)
    held = {name: np.arange(i, len(x), 3)[: 150 - 40 * i] for i, name in enumerate(SITES)}
    arrays: dict[str, npt.NDArray[Any]] = {}
    for part, rows in (("", slice(None, -30)), ("_test", slice(-30, None))):
        index = [held[name][rows] for name in names]
        pooled = np.concatenate(index)
        owner = np.repeat(names, [len(i) for i in index])
        arrays |= {f"x{part}": x[pooled], f"y{part}": y[pooled], f"client{part}": owner}
    np.savez(path, **arrays)  # type: ignore[arg-type]


def run_file(store: str = "runs", data: Path | None = None, **tables: Any) -> RunFile:
    table: dict[str, Any] = {
        "run": {"name": "three", "rounds": 2, "store": store},
        "data": {"name": "npz", "classes": 2},
        "task": {"kind": "classification", "model": "logistic"},
        "client": {"lr": 0.05, "device": "cpu"},
        "strategy": {"name": "fedavgm", "momentum": 0.5, "max_weight": 120.0},
        "secure_aggregation": {"enabled": True, "keep_setup": True},
        "evaluate": {"every": 0},
    } | tables
    if data is not None:
        table["data"]["path"] = str(data)
    return resolve(table)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    folder = tmp_path_factory.mktemp("network")
    sites = []
    for name in SITES:
        save(folder / f"{name}.npz", (name,))
        sites.append(Site(name, folder / f"{name}.npz"))
    save(folder / "all.npz", SITES)
    with Network(folder, sites) as network:
        yield network


def test_a_run_under_masks_makes_the_model_of_the_simulation(
    network: Network, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    job = network.finish(network.submit(run_file(), len(SITES)), seconds=600.0)
    assert job.state == "finished", job.error
    store = RunStore(network.server.store)
    history = store.history(job.run_id)
    assert [sorted(record.participants) for record in history] == [list(SITES)] * 2
    assert not [f for record in history for f in record.failures]
    assert history[-1].per_client == {}
    found = safetensors.torch.load_file(store.model_path(job.run_id))
    data = next(tmp_path_factory.getbasetemp().glob("network*/all.npz"))
    outcome = simulate(run_file(str(tmp_path / "simulated"), data))
    assert outcome.model is not None
    for name, tensor in safetensors.torch.load_file(outcome.model).items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-4)
    # Each site tells which stages it let through, and no server ever asked it for a bare update.
    for name in SITES:
        kinds = {
            entry["kind"]
            for entry in audit_log.read(network.sites[name].audit_file)
            if entry["event"] == "accepted"
        }
        assert {"train.secure_masked", "train.secure_unmask", "evaluate.secure_masked"} <= kinds
        assert not kinds & {"train", "evaluate"}
        # The second round began with the keys of the first.
        entries = audit_log.read(network.sites[name].audit_file)
        dealt = [e["round"] for e in entries if e.get("kind") == "train.secure_shares"]
        assert dealt == ["1"]


def test_sites_add_the_noise_and_each_pays_in_its_own_ledger(network: Network) -> None:
    privacy = {"unit": "client", "mechanism": "distributed-skellam", "noise_multiplier": 2.0}
    run = run_file(
        run={"name": "noisy", "rounds": 1},
        strategy={"weights": "uniform"},
        privacy=privacy,
    )
    job = network.finish(network.submit(run, len(SITES)), seconds=600.0)
    assert job.state == "finished", job.error
    store = RunStore(network.server.store)
    (record,) = store.history(job.run_id)
    assert sorted(record.participants) == list(SITES)
    # One sum with three shares of noise: what the server's ledger says, and each site's own.
    golden = rdp_epsilon({Gaussian(2.0): 1}, 1e-5)
    assert record.epsilon == pytest.approx(golden, rel=0.01)
    assert record.training == {}
    for name in SITES:
        (ledger,) = read(network.sites[name].ledger)
        (line,) = ledger["lines"]
        assert (line["round"], line["mechanism"]["kind"]) == (1, "skellam")
        assert ledger["epsilon"] == pytest.approx(golden, rel=0.01)
