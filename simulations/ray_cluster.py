"""Joins a Ray cluster, or starts one of this machine's cores, and leaves it as it was found."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from typing import Literal, TypeAlias

import ray

from umbel.core.errors import InputError
from umbel.simulations import workers

WHERE = "[run] ray_address"

Kind: TypeAlias = Literal["CPU", "GPU"]
"""What a worker has to itself, as Ray calls it."""

SECONDS = 10.0
"""A cluster takes a connection within so many; Ray itself would try for minutes."""


class Cluster:
    """A connection to Ray; :meth:`close` ends what :func:`join` began.

    Args:
        joined: whether this connection is ours; otherwise the program around us has made it.
    """

    def __init__(self, joined: bool) -> None:
        self._joined = joined

    def close(self) -> None:
        """Leaves the cluster; one that was started for the run ends."""
        if self._joined:
            self._joined = False
            ray.shutdown()


def join(address: str | None) -> Cluster:
    """Connects this process to Ray.

    A connection that the program has made itself, by ``ray.init``, is used as it is.

    Args:
        address: ``host:port`` of a cluster, ``auto`` or ``local``; ``None``: ``RAY_ADDRESS`` of the
            environment, else a cluster of this machine's cores.

    Raises:
        InputError: no cluster answers there, or it runs another version of Ray or Python.
    """
    if ray.is_initialized():
        return Cluster(False)
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    if "://" in address:
        raise InputError(
            f"'{address}' is the address of Ray's client, which holds no data of its own",
            where=WHERE,
            fix="start the run on a node of the cluster, and give host:port or 'auto'",
        )
    # Nobody's use of a hospital's machine is reported to anyone.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray warns of how it will one day treat workers without a GPU: ours do not look for one.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    local = address == "local"
    if ":" in address:
        _knock(address)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            address=address,
            num_cpus=workers.cores() if local else None,
            include_dashboard=False if local else None,
            logging_level=logging.ERROR,
            log_to_driver=False,
        )
    except (ConnectionError, RuntimeError, ValueError, AssertionError, OSError) as error:
        ray.shutdown()
        raise _unreachable(address, " ".join(str(error).split())) from error
    finally:
        # Ray takes SIGTERM for itself, and would end the process before the run is kept.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)
    return Cluster(True)


def _knock(address: str) -> None:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), SECONDS).close()
    except (OSError, ValueError, OverflowError) as error:
        raise _unreachable(address, str(error)) from error


def _unreachable(address: str, why: str) -> InputError:
    return InputError(
        f"no Ray cluster at '{address}': {why}",
        where=WHERE,
        fix="compare with what `ray status` says on its head; without an address, a cluster of "
        "this machine's cores is started",
    )


def total(kind: Kind) -> int:
    """How many processors of a kind the cluster has."""
    return int(ray.cluster_resources().get(kind, 0))  # type: ignore[no-untyped-call]


def free(kind: Kind) -> int:
    """How many of them nobody has asked for."""
    return int(ray.available_resources().get(kind, 0))  # type: ignore[no-untyped-call]
