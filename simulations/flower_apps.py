"""Runs an unmodified Flower app: its ServerApp here, its ClientApp in worker processes."""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from umbel.client.flower.host import Settings
from umbel.core.errors import InputError
from umbel.server.flower.local_grid import LocalGrid, Work
from umbel.server.flower.project import read_project
from umbel.server.flower.run_app import loaded, new_identity, run
from umbel.simulations.flower_pool import Pool


class FlowerRun(NamedTuple):
    """What can be told of an app that has run; what it learned, the app itself prints or saves.

    Args:
        status: ``finished``.
        app: the project's name.
        seconds: of the whole run, the loading of the app included.
        start_seconds: until the workers were up.
        supernodes: how many nodes there were.
        processes: how many of them worked at a time.
        messages: how many were sent to nodes.
        messages_by_type: of them, by type.
        errors: how many replies carried an error.
        run_config: what the app was run with.
    """

    status: str
    app: str
    seconds: float
    start_seconds: float
    supernodes: int
    processes: int
    messages: int
    messages_by_type: dict[str, int]
    errors: int
    run_config: dict[str, Any]


def run_flower_app(
    folder: str | Path,
    *,
    supernodes: int | None = None,
    run_config: Sequence[str] = (),
    processes: int | None = None,
) -> FlowerRun:
    """Runs a Flower app as ``flwr run`` does, in place and without Ray.

    Args:
        folder: with the app's ``pyproject.toml``.
        supernodes: ≥ 1; ``None``: as the app's default federation says, else 10.
        run_config: texts of ``key=value`` pairs that override the app's config.
        processes: ≥ 1 workers; ``None``: one a core, and at most one a node.

    Raises:
        InputError: the app is not valid or cannot be loaded.
        RunError: the ServerApp raised, or no worker can be had.
    """
    began = time.perf_counter()
    for option, number in (("--supernodes", supernodes), ("--processes", processes)):
        if number is not None and number < 1:
            raise InputError(f"{option} = {number}", where="umbel flower", fix="it must be ≥ 1")
    project = read_project(folder, run_config)
    nodes = supernodes or project.supernodes
    workers = processes or min(_cores(), nodes)
    settings = Settings(str(project.folder), project.clientapp, project.run_config)

    def submit(work: Work) -> None:
        pool.submit(work)

    grid = LocalGrid(new_identity(), nodes, submit)
    pool = Pool(settings, workers, grid.fail)
    # The template loads the ClientApp while this process loads the ServerApp.
    with pool, loaded(project) as app:
        pool.start()
        started = time.perf_counter() - began
        gc.freeze()  # replies are many small objects: each full collection would go over torch too
        try:
            run(project, app, grid)
        finally:
            gc.unfreeze()
        grid.check()
    return FlowerRun(
        status="finished",
        app=project.name,
        seconds=time.perf_counter() - began,
        start_seconds=started,
        supernodes=nodes,
        processes=workers,
        messages=grid.counts.total(),
        messages_by_type=dict(grid.counts),
        errors=grid.errors,
        run_config=dict(project.run_config),
    )


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
