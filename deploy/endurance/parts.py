"""What the trials share: two sites with real data, a run, and what must be true after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from sklearn.datasets import load_breast_cancer

from umbel.core.errors import RunError
from umbel.core.payloads import Failure
from umbel.core.run_file import RunFile, resolve
from umbel.deploy.jobs import Job
from umbel.deploy.loopback import Site
from umbel.deploy.network import Network
from umbel.server.records import RoundRecord
from umbel.server.store import RunStore
from umbel.simulations.engines import sequential as engine
from umbel.simulations.simulate import simulate

NAMES = ("aarhus", "basel")
ABSENT: dict[int, set[str]] = {}
"""For :func:`without`, which is called by name: round -> who was missing."""


class Ended(NamedTuple):
    """A run that is over, as the server's store has it."""

    model: dict[str, torch.Tensor]
    history: list[RoundRecord]


def write_data(path: Path, names: tuple[str, ...]) -> None:
    """Wisconsin's breast cancers: the patients of these sites, the last 40 of each as a test."""
    x, y = load_breast_cancer(return_X_y=True)
    x = ((x - x.mean(0)) / x.std(0)).astype(np.float32)
    order = np.argsort(x[:, 0])
    held = {"aarhus": order[:300:2], "basel": order[250:550]}
    arrays: dict[str, npt.NDArray[Any]] = {}
    for part, rows in (("", slice(None, -40)), ("_test", slice(-40, None))):
        index = [held[name][rows] for name in names]
        pooled = np.concatenate(index)
        owner = np.repeat(names, [len(i) for i in index])
        arrays |= {f"x{part}": x[pooled], f"y{part}": y[pooled], f"client{part}": owner}
    np.savez(path, **arrays)  # type: ignore[arg-type]


def two_sites(folder: Path) -> list[Site]:
    """Their files; ``all.npz`` beside them is for the simulation."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        write_data(folder / f"{name}.npz", (name,))
    write_data(folder / "all.npz", NAMES)
    return [Site(name, folder / f"{name}.npz") for name in NAMES]


def run_file(rounds: int, *, private: bool = False, **changes: dict[str, Any]) -> RunFile:
    """Logistic regression with momentum at the server; ``private``: DP-SGD with stated noise."""
    table: dict[str, Any] = {
        "run": {"name": "endurance", "rounds": rounds},
        "data": {"name": "npz", "classes": 2},
        "task": {"kind": "classification", "model": "logistic"},
        "client": {"lr": 0.05, "device": "cpu"},
        "strategy": {"name": "fedavgm", "momentum": 0.5},
        "evaluate": {"every": 0},
    }
    if private:
        table["privacy"] = {"unit": "example", "noise_multiplier": 1.0, "delta": 1e-4}
    for section, keys in changes.items():
        table[section] = {**table.get(section, {}), **keys}
    return resolve(table)


def ended(network: Network, job: Job) -> Ended:
    """What the store has of a run.

    Raises:
        RunError: its rounds have gaps, or one was committed twice.
    """
    store = RunStore(network.server.store)
    history = store.history(job.run_id)
    model = safetensors.torch.load_file(store.model_path(job.run_id))
    store.close()
    rounds = [record.round for record in history]
    if rounds != list(range(1, job.rounds + 1)):
        raise RunError(f"rounds {rounds} of {job.rounds}", where=str(network.folder))
    return Ended(model, list(history))


def undisturbed(network: Network, found: Ended) -> dict[str, torch.Tensor]:
    """The model of a simulation in which the same clients took part in the same rounds."""
    ABSENT.clear()
    for record in found.history:
        ABSENT[record.round] = set(NAMES) - set(record.participants)
    run = {"store": str(network.folder / "simulated")}
    data = {"path": str(network.folder / "all.npz")}
    name = f"{__name__}:without"
    outcome = simulate(run_file(len(found.history), run=run, data=data), engine=name)
    assert outcome.model is not None
    return safetensors.torch.load_file(outcome.model)


def without(*arguments: Any, **keywords: Any) -> Any:
    """The sequential engine, from whose rounds some clients are missing."""
    return _Without(engine.sequential(*arguments, **keywords))


class _Without:
    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def train(self, plan: Any) -> Any:
        missing = ABSENT.get(plan.round, set())
        for client in plan.clients:
            if client in missing:
                yield Failure(client, "absent")
        yield from self._inner.train(plan.part([c for c in plan.clients if c not in missing]))


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two models are equal to float tolerance."""
    return one.keys() == other.keys() and all(
        torch.allclose(tensor, other[name], rtol=1.3e-6, atol=1e-5) for name, tensor in one.items()
    )


def debits(network: Network, name: str, job: Job) -> int:
    """Rounds of a run that a site's ledger has paid for."""
    [table] = network.umbel("site", "ledger", "--folder", name)["ledgers"]
    return sum(line["run"] == job.id for line in table["lines"])
