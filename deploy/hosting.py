"""Where the members of a federation on this machine run: as processes, or (containers.py) apart."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Protocol

HOST = "127.0.0.1"

# Flower asks for updates, reports its use and installs packages unless it is told not to; and its
# processes look for work once a second.
SWITCHES = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
    "RAY_USAGE_STATS_ENABLED": "0",
    "PYTHONUNBUFFERED": "1",
}


class Member(NamedTuple):
    """The server or a site, to be started.

    Args:
        name: its own, within the federation.
        arguments: what follows ``umbel``.
        folder: it may write here, and nowhere else where that can be held.
        data: it may read this; ``None``: nothing more.
        log: where what it says is appended.
    """

    name: str
    arguments: Sequence[str]
    folder: Path
    data: Path | None
    log: Path


class Running(Protocol):
    """A member that was started."""

    def poll(self) -> int | None:
        """The exit status; ``None``: it runs."""

    def send(self, number: int) -> None:
        """Sends a signal; nothing happens where it has ended."""

    def wait(self, seconds: float) -> int | None:
        """Waits for its end; ``None``: it still runs then."""

    @property
    def pid(self) -> int:
        """Its process on this machine."""


class Hosting(Protocol):
    """Starts members."""

    @property
    def names(self) -> Sequence[str]:
        """What the server's certificate is for; sites connect to the first."""

    @property
    def listen(self) -> str:
        """The address that the server listens on."""

    def prepare(self, folder: Path) -> None:
        """Called once when everything is provisioned, before the first start."""

    def adopt(self, folder: Path) -> None:
        """Called when this process has made something in a member's folder."""

    def start(self, member: Member) -> Running:
        """Starts a member."""

    def close(self) -> None:
        """Called when all have ended."""


class Process:
    """A member as a process of its own session."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def poll(self) -> int | None:
        """The exit status; ``None``: it runs."""
        return self._process.poll()

    def send(self, number: int) -> None:
        """Sends a signal."""
        with suppress(ProcessLookupError):
            self._process.send_signal(number)

    def wait(self, seconds: float) -> int | None:
        """Waits for its end."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid


class Processes:
    """Members are processes of this user, over the loopback interface."""

    names = ("localhost", HOST)
    listen = HOST

    def prepare(self, folder: Path) -> None:
        """Nothing to do."""

    def adopt(self, folder: Path) -> None:
        """Nothing to do."""

    def start(self, member: Member) -> Process:
        """Starts a member."""
        with member.log.open("ab") as log:
            started = subprocess.Popen(
                umbel_command(member.arguments),
                cwd=member.folder.parent,
                env=environment(member.folder.parent),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return Process(started)

    def close(self) -> None:
        """Nothing to do."""


def umbel_command(arguments: Sequence[str]) -> list[str]:
    """This installation's ``umbel``."""
    start = "import sys; from umbel.cli.main import main; sys.exit(main())"
    return [sys.executable, "-P", "-c", start, *arguments]


def environment(folder: Path) -> dict[str, str]:
    """This process's, with Flower kept quiet and its files below ``folder``."""
    return {**os.environ, **SWITCHES, "FLWR_HOME": str(folder / "flwr")}
