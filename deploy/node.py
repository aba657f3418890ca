"""``umbel server start``: the door that faces the sites, and the manager of runs behind it."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from umbel.core import locks
from umbel.core.errors import InputError, RunError
from umbel.deploy.dashboard.serve import Beside
from umbel.deploy.manager import Manager, write_status
from umbel.deploy.server_folder import ServerFolder

STATUS_SECONDS = 1.0


def start(folder: ServerFolder, report: Callable[[str], None], *, dashboard: bool = False) -> None:
    """Serves until it is interrupted (Ctrl-C, SIGTERM).

    Args:
        folder: the server's.
        report: called with what an administrator should know.
        dashboard: whether one is served beside it.
    Raises:
        InputError: no server was made here, it runs already, or the port is taken.
        RunError: the door could not be opened.
    """
    from umbel.server.flower.fleet import Door, fleet_server
    from umbel.server.flower.link import nodes, open_factory

    settings = folder.settings()
    folder.make()
    os.umask(0o077)
    lock = locks.acquire(folder.lock_file)
    if lock is None:
        raise InputError(
            "this server runs already", where=str(folder.path), fix="end the other process"
        )
    port = settings.listen_port or settings.port
    _is_free(settings.listen, port)
    factory = open_factory(folder.link_database)
    largest = settings.max_message_mb * 1_000_000
    door = Door(settings.listen, port, folder.certificate, folder.certificate_key, largest)
    server = fleet_server(factory, door)
    last = 0.0

    def status(table: dict[str, Any]) -> None:
        nonlocal last
        if time.monotonic() - last < STATUS_SECONDS:
            return
        last = time.monotonic()
        known = nodes(factory.state())
        sites = {
            name: {"online": known[site.node_id].online, "seen": known[site.node_id].seen}
            for name, site in folder.members().items()
            if site.node_id in known
        }
        write_status(folder, {"time": time.time(), "pid": os.getpid(), "sites": sites, **table})

    manager = Manager(folder, report, status)
    manager.start()
    beside = Beside(folder, report) if dashboard else None
    try:
        if beside is not None:
            beside.start()
        report(f"listening on {settings.listen}:{port} as {', '.join(settings.hosts)}")
        _serve(server)
    finally:
        if beside is not None:
            beside.close()
        manager.close()
        folder.status_file.unlink(missing_ok=True)
        lock.close()
    report("ended")


def _serve(server: Any) -> None:
    """Runs the door in a thread: the main thread waits for a signal."""
    server.install_signal_handlers = lambda: None
    ended = threading.Event()
    thread = threading.Thread(target=server.run, name="door")
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    thread.start()
    try:
        while thread.is_alive() and not ended.wait(0.5):
            continue
        raise RunError("the door closed by itself", where="server", fix="see the lines above")
    except KeyboardInterrupt:
        pass
    finally:
        server.should_exit = True
        thread.join(timeout=15)
        signal.signal(signal.SIGTERM, before)


def _is_free(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InputError(
                f"cannot listen on {host}:{port}: {error.strerror}",
                where="server.toml",
                fix="choose another port, or end what listens there",
            ) from None
