"""A whole federation on this machine, as it is deployed: a server and its sites.

The same commands as in docs/deploy.md, in the same order; each member is a process, or a container.
For a first look, for tests and for measurements.
"""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from umbel.client.folder import SiteFolder
from umbel.core.errors import RunError
from umbel.core.run_file import RunFile
from umbel.deploy.hosting import Hosting, Member, Processes, Running, environment, umbel_command
from umbel.deploy.jobs import OVER, Job, Jobs
from umbel.deploy.loopback import STOP_SECONDS, Site, free_ports
from umbel.deploy.server_folder import ServerFolder
from umbel.deploy.state import server_state

SERVER = "server"


class Network:
    """A federation that is up between ``with`` and its end.

    Args:
        folder: of everything; what an earlier one left in it is used again.
        sites: who takes part.
        hosting: where the members run; ``None``: as processes.
        patience: seconds to wait for each member to be there.
    Raises:
        RunError: a member did not start or ended early; the end of its log is quoted.
    """

    def __init__(
        self,
        folder: Path,
        sites: Sequence[Site],
        *,
        hosting: Hosting | None = None,
        patience: float = 180.0,
    ) -> None:
        self.folder = folder.absolute()
        self.server = ServerFolder(self.folder / SERVER)
        self.sites = {site.client: SiteFolder(self.folder / site.client) for site in sites}
        self._data = {site.client: site.data for site in sites}
        self._patience = patience
        self.hosting: Hosting = Processes() if hosting is None else hosting
        self._members: dict[str, Running] = {}

    def __enter__(self) -> Network:
        try:
            if not self.server.settings_file.exists():
                self.provision()
            self.hosting.prepare(self.folder)
            self.start(SERVER)
            for name in self.sites:
                self.start(name)
            self.wait_for(lambda: self.online() >= self.sites.keys(), "the sites")
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def address(self) -> str:
        """``host:port`` of the server."""
        settings = self.server.settings()
        return f"{settings.hosts[0]}:{settings.port}"

    def umbel(self, *arguments: str) -> dict[str, Any]:
        """One command of Umbel, in the folder; what it answers.

        Raises:
            RunError: it failed.
        """
        done = subprocess.run(
            umbel_command([*arguments, "--format", "json"]),
            cwd=self.folder,
            env=environment(self.folder),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RunError(f"umbel {' '.join(arguments)}: {(done.stdout or done.stderr)[-800:]}")
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    def start(self, name: str) -> int:
        """Starts the server or a site; its process id."""
        kind = SERVER if name == SERVER else "site"
        folder = self.folder / name
        without = ["--no-dashboard"] if kind == SERVER else []
        member = Member(
            name,
            [kind, "start", "--folder", str(folder), *without],
            folder,
            self._data.get(name),
            self.folder / f"{name}.log",
        )
        self._members[name] = self.hosting.start(member)
        return self._members[name].pid

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        """Ends the server or a site by this signal, and waits for its end."""
        member = self._members.pop(name)
        member.send(number)
        if member.wait(self._patience) is None:
            raise RunError(f"'{name}' did not end by signal {number}", where=self._tail(name))

    def member(self, name: str) -> Running:
        """The server or a site, while it runs."""
        return self._members[name]

    def pid(self, name: str) -> int:
        """Of the server or a site."""
        return self._members[name].pid

    def log(self, name: str) -> str:
        """What the server or a site said so far."""
        return (self.folder / f"{name}.log").read_text(encoding="utf-8", errors="replace")

    def submit(self, run: RunFile, sites: int = 0) -> Job:
        """Puts a run into the server's queue."""
        job = Jobs(self.server.jobs_database).submit(run, "", sites)
        self.hosting.adopt(self.server.path)
        return job

    def job(self, job: Job) -> Job:
        """What became of it."""
        return Jobs(self.server.jobs_database).get(job.id)

    def finish(self, job: Job, seconds: float = 300.0) -> Job:
        """Waits until a run is over.

        Raises:
            RunError: it is not, or a member ended.
        """
        self.wait_for(lambda: self.job(job).state in OVER, f"run '{job.id}'", seconds)
        return self.job(job)

    def wait_for(self, there: Callable[[], bool], what: str, seconds: float | None = None) -> None:
        """Waits until something is so.

        Raises:
            RunError: it is not so in time, or a member ended.
        """
        until = time.monotonic() + (seconds or self._patience)
        while not there():
            for name, member in self._members.items():
                if (code := member.poll()) is not None:
                    raise RunError(f"'{name}' ended with status {code}", where=self._tail(name))
            if time.monotonic() > until:
                tails = " ".join(self._tail(name) for name in self._members)
                raise RunError(f"{what} took too long", where=tails)
            time.sleep(0.1)

    def provision(self, port: int | None = None) -> None:
        """Makes the server and the sites, and lets the sites join; done on entry, where it is not.

        Args:
            port: that sites connect to; ``None``: a free one.
        Raises:
            InputError: there is a federation in the folder.
        """
        from umbel.deploy import provisioning
        from umbel.server.flower import link

        port = free_ports(1)[0] if port is None else port
        made = provisioning.init_server(self.server, self.hosting.names, port)
        with self.server.settings_file.open("a", encoding="utf-8") as file:
            file.write(f'listen = "{self.hosting.listen}"\n')
        requests = {}
        state = link.open_factory(self.server.link_database).state()  # a second, once for all

        def register(_: Path, key: bytes, name: str) -> int:
            return link.admit(state, key, name)

        for name, site in self.sites.items():
            provisioning.init_site(site, name, self._data[name])
            requests[name] = self.folder / f"{name}.request"
            provisioning.write_request(site, requests[name])
            provisioning.approve(self.server, requests[name], register, link.revoke)
        for name, site in self.sites.items():  # now that all are members, each kit names all
            provisioning.join(site, provisioning.write_kit(self.server, name), made.fingerprint)

    def online(self) -> set[str]:
        """The sites that are there."""
        return {n for n, s in server_state(self.server).sites.items() if s["online"]}

    def _tail(self, name: str) -> str:
        return f"{name}: " + " | ".join(self.log(name).strip().splitlines()[-5:])

    def stop(self) -> None:
        """Ends all."""
        for member in reversed(self._members.values()):
            member.send(signal.SIGTERM)
        until = time.monotonic() + 2 * STOP_SECONDS
        for member in reversed(self._members.values()):
            member.wait(max(0.1, until - time.monotonic()))
        for member in self._members.values():
            member.send(signal.SIGKILL)
            member.wait(STOP_SECONDS)
        self._members.clear()
        self.hosting.close()
