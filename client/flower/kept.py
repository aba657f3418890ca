"""Where a node's client keeps what a strategy has it keep: with the site, never with the server."""

from __future__ import annotations

import os
import re
from pathlib import Path

from flwr.app import Context

from umbel.client.state import GIB, ClientStates
from umbel.core.errors import InputError
from umbel.core.messages import Request

FOLDER = "UMBEL_CLIENT_STATE"
"""In a simulation: the environment variable that names the folder."""

RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def states(request: Request, context: Context, algorithm: str) -> ClientStates:
    """The client's store for the run of ``request``: ``<folder>/<run id>/clients.db``.

    A server says which run it is and not where: the folder is the site's own.

    Args:
        request: of the server.
        context: of the node.
        algorithm: whose tensors they are.

    Raises:
        InputError: the node was given no folder, or the run's id is not a name.
    """
    if RUN_ID.fullmatch(request.run_id) is None:
        raise InputError(
            f"run id {request.run_id[:50]!r} is not a name",
            where="server's message",
            fix="run the same version of Umbel on the server and at the sites",
        )
    config = context.node_config
    if "state" in config:
        folder = Path(str(config["state"]))
    elif "folder" in config:
        folder = Path(str(config["folder"])) / "state"
    elif "client" not in config and FOLDER in os.environ:
        folder = Path(os.environ[FOLDER])
    else:
        raise InputError(
            f"'{algorithm}' keeps tensors at the client, and the node has no folder for them",
            where="node config",
            fix="start the node with --node-config 'state=\"/path/of/a/folder\"'",
        )
    limit = int(request.run.client.state_gib * GIB)
    path = folder / request.run_id / "clients.db"
    return ClientStates(path, algorithm, limit=limit, durable=True)
