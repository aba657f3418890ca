"""A small federation of real processes on this machine: a SuperLink and its sites, over TLS.

Everything that a deployment has: certificates, node keys, a process for each site that sees its own
data alone. It listens on 127.0.0.1 only. Flower 1.41 does not ask who uses its Control API: whoever
has an account on this machine can start a run while it is up.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from umbel.core import signing
from umbel.core.errors import InputError, RunError
from umbel.core.run_file import RunFile
from umbel.deploy.certificates import make_node_key, make_server_files
from umbel.deploy.hosting import HOST, SWITCHES
from umbel.server.store import RunStore

DAYS = 2
STOP_SECONDS = 10.0
FOLLOW = "follow"
PEERS = "peers.json"

APP = """\
[project]
name = "umbel-run"
version = "1.0.0"
description = "A run of Umbel. The app is the Umbel that is installed; this folder holds no code."
license = "Apache-2.0"

[tool.flwr.app]
publisher = "umbel"

[tool.flwr.app.components]
serverapp = "umbel.server.flower.app:app"
clientapp = "umbel.client.flower.app:app"

[tool.flwr.app.config]
run = {run}
sites = {sites}
wait = {wait}
resume = {resume}
peers = {peers}
"""


class Site(NamedTuple):
    """A site of the federation.

    Args:
        client: its name.
        data: where its data lie; ``None``: where the reader looks by itself (``UMBEL_DATA``).
    """

    client: str
    data: Path | None = None


class Loopback:
    """A federation that is up between ``with`` and its end.

    Args:
        folder: for keys, logs, state and run store; made if missing. Keys stay in it.
        sites: who takes part.
        patience: seconds to wait for the SuperLink to come up.

    Raises:
        InputError: two sites of one name, or none.
        RunError: a process did not start or ended early; the end of its log is quoted.
    """

    def __init__(self, folder: Path, sites: Sequence[Site], *, patience: float = 120.0) -> None:
        names = [site.client for site in sites]
        if not names or len(set(names)) < len(names):
            raise InputError(
                f"sites {names}: each needs a name of its own", where="sites", fix="rename one"
            )
        self._folder = folder.absolute()
        self._sites = list(sites)
        self._patience = patience
        self._stack = ExitStack()
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._environment = {**os.environ, **SWITCHES, "FLWR_HOME": str(self._folder / "flwr")}
        # Flower starts its helpers by name: they must be those of this interpreter.
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        self._environment["PATH"] = path

    def __enter__(self) -> Loopback:
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    def pids(self) -> Mapping[str, int]:
        """``superlink`` and the clients -> process id."""
        return {name: process.pid for name, process in self._processes.items()}

    def log(self, name: str) -> str:
        """What ``superlink`` or the site of a client wrote so far."""
        return (self._folder / f"{name}.log").read_text(encoding="utf-8", errors="replace")

    def run(
        self,
        run: RunFile,
        *,
        resume: str | None = None,
        timeout: float | None = None,
        report: Callable[[str], None] = print,
    ) -> str:
        """Submits ``run`` and waits for its end.

        Args:
            run: the run file; its store is in this federation's folder where it is relative.
            resume: id of a run in the store to go on with.
            timeout: seconds after which it is an error; ``None`` waits.
            report: called with each line that the server app prints.

        Returns:
            the run's id in :meth:`store`.
        Raises:
            RunError: the run failed, with the reason from the store; or the time was up.
        """
        table = run.model_dump(mode="json")
        table["run"]["store"] = str(self.store_path(run))
        app = self._folder / "app"
        app.mkdir(exist_ok=True)
        text = APP.format(
            run=json.dumps(json.dumps(table)),  # a JSON string is a TOML string
            sites=len(self._sites),
            wait=int(self._patience),
            resume=json.dumps(resume or ""),
            peers=json.dumps((self._folder / PEERS).read_text(encoding="utf-8")),
        )
        (app / "pyproject.toml").write_text(text, encoding="utf-8")
        before = {entry.run_id for entry in self.store(run).list()}
        number = self._submit(app)
        status = self._follow(number, timeout, report)
        made = [e for e in self.store(run).list() if e.run_id == resume or e.run_id not in before]
        if made and made[0].status == "finished":
            return made[0].run_id
        why = made[0].error if made else f"Flower says {status}; no run was entered in the store"
        raise RunError(f"the run did not finish: {why}", where=self._tail(FOLLOW))

    def store_path(self, run: RunFile) -> Path:
        """Where the server keeps its records."""
        return self._folder / run.run.store

    def store(self, run: RunFile) -> RunStore:
        """The server's run store."""
        return RunStore(self.store_path(run))

    def _start(self) -> None:
        home = self._folder / "flwr"
        home.mkdir(parents=True, exist_ok=True)
        self._folder.chmod(0o700)
        tls = make_server_files(self._folder, ["localhost", HOST], DAYS)
        port, *node_ports = free_ports(1 + len(self._sites))
        address = f"{HOST}:{port}"
        connection = {"address": address, "root-certificates": str(tls.authority)}
        (home / "config.toml").write_text(
            '[superlink]\ndefault = "loopback"\n\n[superlink.loopback]\n'
            + "".join(f"{key} = {json.dumps(value)}\n" for key, value in connection.items()),
            encoding="utf-8",
        )
        self._spawn(
            "superlink",
            "flower-superlink",
            *("--host", HOST, "--port", str(port)),
            *("--ssl-ca-certfile", str(tls.authority)),
            *("--ssl-certfile", str(tls.certificate), "--ssl-keyfile", str(tls.key)),
            *("--enable-supernode-auth", "--database", str(self._folder / "superlink.db")),
        )
        self._wait_for(port)
        # As provisioning does: a signing key for each site, and the keys of all in everyone's hand.
        peers: dict[str, str] = {}
        for site in self._sites:
            path = self._folder / f"{site.client}.pem"
            own = signing.read_key(path) if path.exists() else signing.make_key(path)
            peers[site.client] = signing.public_bytes(own).hex()
        (self._folder / PEERS).write_text(json.dumps(peers), encoding="utf-8")
        for site, node_port in zip(self._sites, node_ports, strict=True):
            key = self._folder / f"{site.client}.key"
            public = make_node_key(key)
            self._flwr("supernode", "register", str(public), "--name", site.client)
            config = f"client={json.dumps(site.client)}"
            config += f" identity={json.dumps(str(self._folder / f'{site.client}.pem'))}"
            config += f" peers={json.dumps(str(self._folder / PEERS))}"
            if site.data is not None:
                config += f" data={json.dumps(str(site.data.absolute()))}"
            config += f" state={json.dumps(str(self._folder / 'state' / site.client))}"
            self._spawn(
                site.client,
                "flower-supernode",
                *("--superlink", address, "--root-certificates", str(tls.authority)),
                *("--auth-supernode-private-key", str(key)),
                *("--node-config", config, "--host", HOST, "--port", str(node_port)),
            )

    def _spawn(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        log = self._stack.enter_context((self._folder / f"{name}.log").open("wb"))
        process = subprocess.Popen(
            self._command(command),
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # a Ctrl-C is this process's to handle, in order
        )
        self._processes[name] = process
        return process

    def _command(self, command: Sequence[str]) -> list[str]:
        program = Path(sys.executable).parent / command[0]
        if not program.exists():
            raise InputError(
                f"'{command[0]}' is not installed", where=str(program.parent), fix="install flwr"
            )
        return [str(program), *command[1:]]

    def _flwr(self, *arguments: str) -> str:
        done = subprocess.run(
            self._command(("flwr", *arguments)),
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            said = (done.stderr or done.stdout).strip()[-500:]
            raise RunError(f"{shlex.join(('flwr', *arguments))} failed: {said}", where="loopback")
        return done.stdout

    def _wait_for(self, port: int) -> None:
        until = time.monotonic() + self._patience
        while time.monotonic() < until:
            self._check("superlink")
            try:
                socket.create_connection((HOST, port), timeout=1).close()
            except OSError:
                time.sleep(0.1)
            else:
                return
        raise RunError(
            f"the SuperLink did not come up in {self._patience:g} s", where=self._tail("superlink")
        )

    def _check(self, name: str) -> None:
        if (code := self._processes[name].poll()) is not None:
            raise RunError(f"'{name}' ended with status {code}", where=self._tail(name))

    def _tail(self, name: str) -> str:
        lines = self.log(name).strip().splitlines()[-5:]
        return f"{self._folder / name}.log: " + " | ".join(lines)

    def _submit(self, app: Path) -> int:
        answer = self._flwr("run", str(app), "--format", "json")
        try:
            return int(json.loads(answer)["run-id"])
        except (ValueError, KeyError, TypeError):
            said = answer.strip()[-500:]
            raise RunError(f"flwr run did not start the run: {said}", where="loopback") from None

    def _follow(self, number: int, timeout: float | None, report: Callable[[str], None]) -> str:
        """Passes on what the server app prints until the run ends; how it ended, as Flower says."""
        until = float("inf") if timeout is None else time.monotonic() + timeout
        reader = self._spawn(FOLLOW, "flwr", "log", str(number), "--stream")
        shown = 0
        while True:
            ended = reader.poll() is not None
            lines = self.log(FOLLOW).splitlines(keepends=True)
            for line in lines[shown:]:
                if ended or line.endswith("\n"):
                    report(line.rstrip())
                    shown += 1
            if ended:
                break
            self._check("superlink")  # a site may be lost: the round names it and goes on
            if time.monotonic() > until:
                raise RunError(
                    f"the run did not end in {timeout:g} s", where=self._tail("superlink")
                )
            time.sleep(0.2)
        del self._processes[FOLLOW]
        found = json.loads(self._flwr("ls", "--run-id", str(number), "--format", "json"))
        return str(found["runs"][0]["status"])

    def _stop(self) -> None:
        # The sites first: a SuperLink that goes before them leaves them trying to reach it.
        for process in reversed(self._processes.values()):
            _signal(process, signal.SIGTERM)
        until = time.monotonic() + STOP_SECONDS
        for process in reversed(self._processes.values()):
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, until - time.monotonic()))
        for process in self._processes.values():  # and whatever they started and left
            _signal(process, signal.SIGKILL)
            process.wait()
        self._stack.close()


def free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that nobody listens on now."""
    with ExitStack() as stack:
        ports = []
        for _ in range(count):
            listener = stack.enter_context(socket.socket())
            listener.bind((HOST, 0))
            ports.append(int(listener.getsockname()[1]))
        return ports


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    """Signals a process and all that it started: each leads a group of its own."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)
