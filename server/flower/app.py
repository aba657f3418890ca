"""Flower's two ways to run Umbel's server: deployed, as a ``ServerApp``, and in its simulation."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable
from queue import Queue
from typing import Any

from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from umbel.core import run_file
from umbel.core.errors import RunError
from umbel.server.flower.grid import GridFederation
from umbel.server.flower.secure_grid import secured
from umbel.server.records import RoundRecord


def simulation(
    client_app: ClientApp, nodes: int
) -> tuple[Grid, Callable[[], None], Callable[[], None]]:
    """Starts Flower's own simulation: virtual nodes whose client app runs in Ray workers.

    Flower would have its ServerApp in command. Here the ServerApp hands out its grid and waits, so
    that the caller's round loop drives this federation as it does any other.

    Args:
        client_app: what the nodes run.
        nodes: how many; node i is given ``partition-id`` i.

    Returns:
        the grid; a function that raises where the simulation has ended; one that ends it.
    Raises:
        RunError: it does not start.
    """
    # In process, though Flower calls this entry legacy: `flwr run` needs a SuperLink, a FAB and
    # three processes for the same Ray workers, and cannot hand its grid to anyone.
    from flwr.simulation import run_simulation

    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # workers may see the GPU
    flower_log = logging.getLogger("flwr")
    before, path = flower_log.level, os.environ.get("PYTHONPATH")
    flower_log.setLevel(logging.CRITICAL)
    server = ServerApp()
    opened: Queue[Grid | BaseException] = Queue()
    closing = threading.Event()
    ended: list[BaseException] = []

    @server.main()
    def lend(grid: Grid, context: Context) -> None:
        opened.put(grid)
        closing.wait()

    workers = max(1, min(os.cpu_count() or 1, nodes))
    backend: Any = {
        "client_resources": {"num_cpus": 1},
        "init_args": {
            "address": "local",  # never a cluster that somebody else has started here
            "num_cpus": workers,
            "include_dashboard": False,
            "logging_level": "error",
            "log_to_driver": False,
        },
    }

    def run() -> None:
        try:
            run_simulation(server, client_app, nodes, backend_config=backend)
        except BaseException as error:  # handed to whoever waits for the grid or for a reply
            ended.append(error)
            closing.set()
            opened.put(error)

    thread = threading.Thread(target=run, name="flower-simulation")

    def alive() -> None:
        if not closing.is_set() and thread.is_alive():
            return
        why = f": {type(ended[0]).__name__}: {ended[0]}" if ended else ""
        raise RunError(f"Flower's simulation has ended{why}", fix="see Ray's logs")

    def end() -> None:
        closing.set()
        thread.join()
        flower_log.setLevel(before)
        if path is None:  # Flower's backend sets it for the workers
            os.environ.pop("PYTHONPATH", None)
        else:
            os.environ["PYTHONPATH"] = path

    thread.start()
    try:
        grid = opened.get()
        if isinstance(grid, BaseException):
            alive()
            raise RunError(f"Flower's simulation did not start: {grid}")
    except BaseException:
        end()
        raise
    return grid, alive, end


app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """A deployed run.

    Its run config holds ``run``, the resolved run file as JSON; ``sites``, how many to wait for, at
    most ``wait`` seconds; ``resume``, the id of a run to go on with, or an empty string; and, for
    secure aggregation, ``peers``: the sites' pinned keys, a JSON object of hexadecimal digits.
    """
    from umbel.server.serve import serve

    settings = context.run_config
    run = run_file.resolve(json.loads(str(settings["run"])), "run config")
    sites, wait = int(str(settings["sites"])), float(str(settings["wait"]))
    inner = GridFederation(grid, run, sites=sites, wait=wait)
    peers = json.loads(str(settings.get("peers", "")) or "{}")
    federation = secured(inner, {str(n): bytes.fromhex(key) for n, key in peers.items()})
    print(f"{sites} sites: {', '.join(federation.clients())}", flush=True)

    def on_round(record: RoundRecord) -> None:
        figures = " ".join(f"{n} {v:.4f}" for n, v in sorted(record.metrics.items()))
        lost = "".join(f"; {f.client} {f.reason}" for f in record.failures)
        print(
            f"round {record.round}/{run.run.rounds}: {len(record.participants)} clients, "
            f"{record.seconds:.1f} s {figures}{lost}",
            flush=True,
        )

    serve(
        federation.run,
        federation,
        federation.info,
        engine="flower-deployment",
        resume=str(settings.get("resume", "")) or None,
        on_start=lambda run_id: print(f"run {run_id}", flush=True),
        on_round=on_round,
    )
