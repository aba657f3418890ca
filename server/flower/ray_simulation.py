"""Runs a Flower app on Flower's own simulation: what ``umbel flower`` is compared with.

    python -m umbel.server.flower.ray_simulation APP_DIR [--supernodes N] [--run-config …]

As ``flwr run`` does it, apart from the SuperLink and the copy of the app that it starts from. The
setting is the tuned one, an actor of one thread for each core; Flower's default is slower by far.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from flwr.app import Context, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.simulation.run_simulation import _run_simulation
from flwr.supercore.constant import NOOP_FEDERATION_ID
from flwr.supercore.run import Run
from flwr.supercore.telemetry import EventType

from umbel.server.flower.project import read_project
from umbel.server.flower.run_app import new_identity


def simulate(folder: Path, supernodes: int | None, run_config: Sequence[str], actors: int) -> None:
    """Runs an app in this process's Ray; the process can be used for nothing else afterwards.

    Args:
        folder: the app's.
        supernodes: how many nodes; ``None``: as the app says.
        run_config: overrides, as for ``flwr run``.
        actors: Ray's workers, of one thread each.
    """
    project = read_project(folder, run_config)
    identity = new_identity()
    run = Run.create_empty(identity)
    run.primary_task_id, run.federation_id = identity, NOOP_FEDERATION_ID
    run.override_config = dict(project.run_config)
    context = Context(identity, SUPERLINK_NODE_ID, {}, RecordDict(), dict(project.run_config))
    _run_simulation(
        num_supernodes=supernodes or project.supernodes,
        exit_event=EventType.FLWR_SIMULATION_RUN_LEAVE,
        server_app_attr=project.serverapp,
        client_app_attr=project.clientapp,
        server_app_context=context,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {
                "address": "local",  # never a cluster that somebody else has started here
                "num_cpus": actors,
                "include_dashboard": False,
                "log_to_driver": False,
            },
        },
        app_dir=str(project.folder),
        run=run,
        is_app=True,
    )


def main() -> None:
    """The entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--supernodes", type=int)
    parser.add_argument("--run-config", action="append", default=[])
    parser.add_argument("--actors", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    simulate(options.folder, options.supernodes, options.run_config, options.actors)


if __name__ == "__main__":
    main()
