"""A network that is cut, a database that somebody locks, a disk that is full.

While the trouble lasts no process may end that Umbel does not start again by itself; when it is
over, every site must be back within half a minute, and the run go on to its end with nothing lost.
"""

from __future__ import annotations

import os
import selectors
import socket
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from umbel.core.errors import InputError
from umbel.deploy.endurance import parts
from umbel.deploy.hosting import HOST
from umbel.deploy.jobs import Job
from umbel.deploy.loopback import free_ports
from umbel.deploy.network import Network
from umbel.deploy.state import server_state

ROUNDS = 6
BACK_SECONDS = 30.0
PIECE = 1 << 16
SMALL_DISK = "size=4m"


class Found(NamedTuple):
    """What a trouble did.

    Args:
        trouble: its name.
        seconds: that it lasted.
        back: seconds from its end until all sites were online.
        state: of the run at its end.
        faults: what was not as it must be; empty: nothing.
    """

    trouble: str
    seconds: float
    back: float
    state: str
    faults: tuple[str, ...]


class Wire:
    """Carries the bytes between sites and a server, until it is cut."""

    def __init__(self, to: int) -> None:
        self._to = to
        self._listener = socket.create_server((HOST, 0))
        self.port = int(self._listener.getsockname()[1])
        self._whole = threading.Event()
        self._whole.set()
        self._ends: set[socket.socket] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """No byte passes any more, on connections that stand and on new ones."""
        self._whole.clear()

    def mend(self) -> None:
        """Connections that stood are lost; new ones are carried."""
        for end in list(self._ends):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self._whole.set()

    def close(self) -> None:
        """Ends everything."""
        self._listener.close()
        self.mend()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                threading.Thread(target=self._carry, args=(near,), daemon=True).start()

    def _carry(self, near: socket.socket) -> None:
        self._whole.wait()
        ends = {near}
        with suppress(OSError, ValueError), near, socket.create_connection((HOST, self._to)) as far:
            ends = {near, far}
            self._ends |= ends
            with selectors.DefaultSelector() as ready:
                ready.register(near, selectors.EVENT_READ, far)
                ready.register(far, selectors.EVENT_READ, near)
                while True:
                    for key, _ in ready.select():
                        piece = key.fileobj.recv(PIECE)  # type: ignore[union-attr]
                        self._whole.wait()
                        if not piece:
                            return
                        key.data.sendall(piece)
        self._ends -= ends


def partition(folder: Path, seconds: float, report: Callable[[str], None] = print) -> Found:
    """Cuts every site off the server in the middle of a run."""
    behind = free_ports(1)[0]
    wire = Wire(behind)
    try:
        network = Network(folder, parts.two_sites(folder))
        network.provision(wire.port)
        with network.server.settings_file.open("a", encoding="utf-8") as file:
            file.write(f"listen_port = {behind}\n")
        with network:
            return _through(network, "partition", lambda: _cut(wire, seconds), seconds, report)
    finally:
        wire.close()


def locked(folder: Path, seconds: float, report: Callable[[str], None] = print) -> Found:
    """Keeps the run store's, the queue's and the messages' databases locked for a while."""
    with Network(folder, parts.two_sites(folder)) as network:
        server = network.server
        names = (server.store / "umbel.db", server.jobs_database, server.link_database)
        return _through(network, "locked", lambda: _lock(names, seconds), seconds, report)


def full(folder: Path, seconds: float, report: Callable[[str], None] = print) -> Found:
    """Fills the disk that the server keeps runs on; needs root, for a small disk of its own.

    Raises:
        InputError: this user may not mount one.
    """
    network = Network(folder, parts.two_sites(folder))
    network.provision()
    with _small_disk(network.server.store) as disk, network:
        return _through(network, "full", lambda: _fill(disk, seconds), seconds, report)


def _through(
    network: Network,
    name: str,
    trouble: Callable[[], None],
    seconds: float,
    report: Callable[[str], None],
) -> Found:
    known = set(_zombies())
    job = network.submit(parts.run_file(ROUNDS))
    network.wait_for(lambda: network.job(job).round >= 2, "the second round")
    report(f"{name} for {seconds:g} s, after round {network.job(job).round}")
    trouble()
    over = time.monotonic()
    network.wait_for(lambda: _all_online(network), "all sites")
    back = time.monotonic() - over
    done = _finish(network, job)
    faults = []
    if back > BACK_SECONDS:
        faults.append(f"the sites were back after {back:.0f} s")
    if done.state != "finished":
        faults.append(f"{done.state}: {done.error}")
    else:
        found = parts.ended(network, done)
        if not parts.same(found.model, parts.undisturbed(network, found)):
            faults.append("another model than undisturbed")
    if zombies := _left_over(known):
        faults.append(f"zombies: {', '.join(map(str, zombies))}")
    report(f"{name}: back after {back:.1f} s; {'; '.join(faults) or 'as it must be'}")
    return Found(name, seconds, back, done.state, tuple(faults))


def _finish(network: Network, job: Job) -> Job:
    done = network.finish(job, seconds=900)
    if done.state == "failed":  # the manager gave up while the trouble lasted: an order is enough
        network.umbel("resume", job.id, "--folder", str(network.server.path))
        done = network.finish(job, seconds=900)
    return done


def _all_online(network: Network) -> bool:
    sites = server_state(network.server).sites
    return len(sites) == len(parts.NAMES) and all(site["online"] for site in sites.values())


def _cut(wire: Wire, seconds: float) -> None:
    wire.cut()
    time.sleep(seconds)
    wire.mend()


def _lock(files: tuple[Path, ...], seconds: float) -> None:
    held = []
    for file in files:
        connection = sqlite3.connect(file, timeout=60.0, isolation_level=None)
        connection.execute("BEGIN IMMEDIATE")
        held.append(connection)
    time.sleep(seconds)
    for connection in held:
        with closing(connection):
            connection.execute("ROLLBACK")


def _fill(disk: Path, seconds: float) -> None:
    filler = disk / "filler"
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * PIECE)
    with suppress(OSError), filler.open("ab", buffering=0) as file:
        while True:
            file.write(b"x")
    time.sleep(seconds)
    filler.unlink()


@contextmanager
def _small_disk(place: Path) -> Iterator[Path]:
    place.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", SMALL_DISK, "tmpfs", str(place)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        raise InputError(
            "cannot mount a small disk", where=str(place), fix="run it as root, outside a container"
        )
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def _left_over(known: set[int]) -> list[int]:
    """Zombies that nobody waits for: who has just ended is given time to be."""
    until = time.monotonic() + BACK_SECONDS
    while (found := sorted(set(_zombies()) - known)) and time.monotonic() < until:
        time.sleep(0.5)
    return found


def _zombies() -> list[int]:
    """Children of this process, and theirs, that have ended and nobody has waited for."""
    children: dict[int, list[int]] = {}
    dead = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError):
            fields = stat.read_text().rpartition(")")[2].split()
            pid = int(stat.parent.name)
            children.setdefault(int(fields[1]), []).append(pid)
            if fields[0] == "Z":
                dead.add(pid)
    waiting, below = [os.getpid()], set()
    while waiting:
        found = children.get(waiting.pop(), [])
        below.update(found)
        waiting += found
    return sorted(below & dead)
