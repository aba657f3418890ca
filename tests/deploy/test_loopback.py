"""A deployment on this machine: TLS, node keys, a SuperLink and a process for each site."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import safetensors.torch
import torch
from sklearn.datasets import load_breast_cancer

from umbel.core.errors import InputError
from umbel.core.run_file import RunFile, resolve
from umbel.deploy.loopback import Loopback, Site, free_ports
from umbel.simulations.simulate import simulate

Hospitals = dict[str, npt.NDArray[np.int64]]


def hospitals() -> tuple[npt.NDArray[Any], npt.NDArray[Any], Hospitals]:
    """Patients of two hospitals that differ in size and in what they see."""
    x, y = load_breast_cancer(return_X_y=True)
    x = ((x - x.mean(0)) / x.std(0)).astype(np.float32)
    order = np.argsort(x[:, 0])
    return x, y, {"aarhus": order[:300:2], "basel": order[250:550]}


def save(path: Path, names: list[str]) -> None:
    """The examples of these hospitals alone, the last 40 of each as its test part."""
    x, y, held = hospitals()
    arrays: dict[str, npt.NDArray[Any]] = {}
    for part, rows in (("", slice(None, -40)), ("_test", slice(-40, None))):
        index = [held[name][rows] for name in names]
        owner = np.repeat(names, [len(i) for i in index])
        pooled = np.concatenate(index)
        arrays |= {f"x{part}": x[pooled], f"y{part}": y[pooled], f"client{part}": owner}
    np.savez(path, **arrays)  # type: ignore[arg-type]


def run_file(store: str, data: Path | None = None) -> RunFile:
    table: dict[str, Any] = {
        "run": {"name": "two-hospitals", "rounds": 1, "store": store},
        "data": {"name": "npz", "classes": 2},
        "task": {"kind": "classification", "model": "logistic"},
        "client": {"lr": 0.05, "device": "cpu"},
        "strategy": {"name": "fedavgm", "momentum": 0.5},
        "evaluate": {"every": 0},
    }
    if data is not None:
        table["data"]["path"] = str(data)
    return resolve(table)


def running(groups: set[int]) -> list[str]:
    """What still runs in these process groups; what has ended and waits to be reaped does not."""
    found = []
    for stat_file in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = stat_file.read_text().rpartition(")")
        except OSError:  # it has ended
            continue
        state, _, group = rest.split()[:3]
        if int(group) in groups and state != "Z":
            found.append(name)
    return found


@pytest.mark.flower
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_a_deployed_run_makes_the_model_of_the_simulation(tmp_path: Path) -> None:
    save(tmp_path / "all.npz", ["aarhus", "basel"])
    sites = []
    for name in ("aarhus", "basel"):
        (tmp_path / name).mkdir()
        save(tmp_path / name / "patients.npz", [name])
        sites.append(Site(name, tmp_path / name))
    run = run_file("runs")
    lines: list[str] = []
    with Loopback(tmp_path / "federation", sites) as federation:
        pids = federation.pids()
        assert pids.keys() == {"superlink", "aarhus", "basel"}
        assert running(set(pids.values()))
        run_id = federation.run(run, timeout=240, report=lines.append)
        store = federation.store(run)
    assert not running(set(pids.values()))
    entry, history = store.get(run_id), store.history(run_id)
    assert (entry.status, entry.rounds_done) == ("finished", 1)
    assert any(line.startswith("round 1/1: 2 clients") for line in lines)
    assert [sorted(r.participants) for r in history] == [["aarhus", "basel"]]
    assert not [f for r in history for f in r.failures]

    outcome = simulate(run_file(str(tmp_path / "simulated"), tmp_path / "all.npz"))
    assert outcome.model is not None
    twin = safetensors.torch.load_file(outcome.model)
    deployed = safetensors.torch.load_file(store.model_path(run_id))
    assert deployed.keys() == twin.keys()
    for name, tensor in twin.items():
        torch.testing.assert_close(deployed[name], tensor)
    assert history[-1].metrics == pytest.approx(outcome.metrics, rel=1e-5)
    assert history[-1].per_client.keys() == outcome.per_client.keys()
    for site in sites:
        key = tmp_path / "federation" / f"{site.client}.key"
        assert stat.S_IMODE(key.stat().st_mode) == 0o600


def test_sites_need_names_of_their_own(tmp_path: Path) -> None:
    for sites in ([], [Site("a"), Site("a")]):
        with pytest.raises(InputError, match="each needs a name of its own"):
            Loopback(tmp_path, sites)


def test_free_ports_are_distinct() -> None:
    assert len(set(free_ports(8))) == 8
