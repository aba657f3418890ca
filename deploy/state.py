"""Whether a server runs, and who is there, for whoever may read its folder."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from umbel.core import locks
from umbel.deploy.server_folder import ServerFolder

STALE_SECONDS = 30.0


class ServerState(NamedTuple):
    """A server as its folder shows it.

    Args:
        running: whether a process serves it.
        pid: that process; ``None``: none.
        job: the run under way, by its id in the queue.
        sites: member -> ``online``, and ``seen``: until when it counts as online.
        up: whether that process has said so within half a minute.
        run_pid: the process of the run under way.
    """

    running: bool
    pid: int | None
    job: str | None
    sites: Mapping[str, Mapping[str, Any]]
    up: bool = False
    run_pid: int | None = None


def server_state(folder: ServerFolder) -> ServerState:
    """The state now.

    Raises:
        InputError: there is no server in the folder.
    """
    folder.settings()
    running = locks.is_held(folder.lock_file)
    nobody = {name: {"online": False, "seen": 0.0} for name in folder.members()}
    try:
        table = json.loads(folder.status_file.read_text(encoding="utf-8"))
        fresh = time.time() - table["time"] < STALE_SECONDS
    except (OSError, ValueError, KeyError):
        table, fresh = {}, False
    if not running or not fresh:
        return ServerState(running, table.get("pid") if running else None, None, nobody)
    return ServerState(
        True,
        table["pid"],
        table.get("job"),
        {**nobody, **table["sites"]},
        True,
        table.get("run_pid"),
    )
