"""A federation of a server and three sites on this machine, for a first look."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from umbel.core.errors import RunError
from umbel.core.run_file import RunFile, resolve
from umbel.datasets.build import load
from umbel.deploy.hosting import Hosting
from umbel.deploy.loopback import Site
from umbel.deploy.network import Network
from umbel.server.store import RunStore
from umbel.simulations.simulate import Outcome

SITES = ("aarhus", "basel", "cork")


def demo_network(
    folder: Path,
    rounds: int,
    hosting: Hosting | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Outcome:
    """Provisions the federation, has it carry out a run, and ends it.

    Three sites hold scikit-learn's digits, each few of the ten; what a site may read is its own
    file. The global test set is dealt to the sites, where the model is evaluated.

    Args:
        folder: of everything; kept, and used again.
        rounds: of the run.
        hosting: where the members run; ``None``: as processes.
        report: called with what goes on.

    Returns:
        what ``umbel simulate`` answers.

    Raises:
        RunError: a member did not start, or the run failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sites = [Site(name, folder / "data" / f"{name}.npz") for name in SITES]
    write_digits(sites)
    with Network(folder, sites, hosting=hosting) as network:
        report(f"server and {len(sites)} sites are up, in {network.folder}")
        job = network.submit(demo_run(rounds))
        seen = 0

        def over() -> bool:
            nonlocal seen
            now = network.job(job)
            if now.round > seen:
                seen = now.round
                report(f"round {seen} of {now.rounds}")
            return now.state not in ("queued", "running")

        network.wait_for(over, f"run '{job.id}'", 60.0 + 60.0 * rounds)
        ended = network.job(job)
        if ended.state not in ("finished", "budget_exhausted"):
            raise RunError(f"the run {ended.state}: {ended.error}", where=str(network.folder))
        return _outcome(RunStore(network.server.store), ended.run_id)


def demo_run(rounds: int) -> RunFile:
    """The run file of the demonstration."""
    return resolve(
        {
            "run": {"name": "demo", "rounds": rounds, "seed": 1},
            "data": {"name": "npz", "classes": 10},
            "task": {"kind": "classification", "model": {"name": "mlp", "hidden": [64]}},
            "client": {"lr": 0.05, "momentum": 0.9, "batch_size": 16, "device": "cpu"},
        }
    )


def write_digits(sites: list[Site]) -> None:
    """A file for each site: its share of the digits by Dirichlet(0.3), and of the test set."""
    section = resolve(
        {
            "data": {
                "name": "digits",
                "split": {"kind": "dirichlet", "clients": len(sites), "alpha": 0.3},
            },
            "task": {"kind": "classification"},
        }
    ).data
    data = load(section, seed=1)
    assert data.test is not None
    for place, site in enumerate(sites):
        own = data.train_part(place)
        test = {name: column[place :: len(sites)] for name, column in data.test.items()}
        assert site.data is not None
        site.data.parent.mkdir(exist_ok=True)
        np.savez(
            site.data,
            x=own["x"],
            y=own["y"],
            x_test=test["x"],
            y_test=test["y"],
            client=np.repeat([site.client], len(own["y"])),
            client_test=np.repeat([site.client], len(test["y"])),
        )


def _outcome(store: RunStore, run_id: str) -> Outcome:
    entry, history = store.get(run_id), store.history(run_id)
    model = store.model_path(run_id)
    last = history[-1]
    outcome = Outcome(
        run_id,
        entry.status,
        entry.rounds_done,
        entry.seconds,
        last.metrics,
        last.per_client,
        store.privacy(run_id),
        str(model) if model.is_file() else None,
        history,
    )
    store.close()
    return outcome
