"""Flower's own simulation as a federation."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from umbel.core.extras import extra
from umbel.core.payloads import Federation
from umbel.core.run_file import RunFile
from umbel.datasets.federated import FederatedData
from umbel.strategies.parts import ClientRule
from umbel.tasks.task import Task


def flower(
    run: RunFile,
    data: FederatedData,
    task: Task,
    rule: ClientRule,
    announce: Callable[[str], None] = lambda message: None,
) -> Federation:
    """Flower's own simulation: the client app that sites run, in Ray workers, a node a client.

    Slower to start than the engines of this process, and the nearest thing to a deployment. Workers
    read the data themselves, as sites do: ``data``, ``task`` and ``rule`` are what they will find.

    Raises:
        InputError: Ray, in whose workers it runs, is not installed.
        RunError: it does not start.
    """
    with extra("ray", "--engine flower"):
        import ray  # noqa: F401  # Flower would start without, and fail in a thread
    announce("starting Flower's simulation: some ten seconds until the first round")
    from umbel.client.flower.app import app
    from umbel.client.flower.kept import FOLDER
    from umbel.server.flower.app import simulation
    from umbel.server.flower.grid import GridFederation
    from umbel.server.flower.secure_grid import secured
    from umbel.server.store import RunStore

    if run.data.path is not None:  # workers need not share this process's working directory
        section = run.data.model_copy(update={"path": str(Path(run.data.path).absolute())})
        run = run.model_copy(update={"data": section})
    os.environ[FOLDER] = str(RunStore(run.run.store).folder.absolute())  # workers inherit it
    grid, alive, end = simulation(app, len(data.names))
    try:
        federation = GridFederation(grid, run, sites=len(data.names), alive=alive, end=end)
        return secured(federation, None)
    except BaseException:
        end()
        raise
