"""``umbel dashboard``: the process that serves it, and how a server starts one."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from umbel.core.errors import InputError
from umbel.deploy.dashboard.settings import DashboardSettings, read_settings, require_safe
from umbel.deploy.server_folder import ServerFolder
from umbel.server.database import locate

RETRY_SECONDS, LONGEST_PAUSE = 30.0, 600.0
PARENT_SECONDS = 1.0


def serve(
    location: str | None,
    folder: ServerFolder | None,
    *,
    port: int | None = None,
    report: Callable[[str], None],
    beside: int | None = None,
) -> None:
    """Serves until it is interrupted.

    Args:
        location: of the store; ``None``: the server's.
        folder: of the server; ``None``: a store alone.
        port: in place of the settings' own.
        report: called with the address, and with the first admin's password.
        beside: the process that started it and that it ends with, even where that is killed.
    Raises:
        InputError: it would listen to a network without TLS, or the port is taken.
    """
    import uvicorn

    from umbel.deploy.dashboard.app import make_app
    from umbel.deploy.dashboard.source import Source
    from umbel.deploy.dashboard.users import Users
    from umbel.deploy.dashboard.watch import Watch

    location = _store(location, folder)
    place = locate(location)
    home = folder.path if folder is not None else place.folder
    settings = read_settings(home)
    require_safe(settings)
    if folder is not None:
        folder.settings()
    os.umask(0o077)
    place.folder.mkdir(parents=True, exist_ok=True)
    listener = _listen(settings, settings.port if port is None else port)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    source, users = Source(location, folder), Users(location)
    password = users.begin(None if folder is None else folder.admin_file)
    if password is not None:
        report(f"password of 'admin', shown this once: {password}")
    app = make_app(source, users, settings.names(), tls=settings.tls)
    scheme, bound = "https" if settings.tls else "http", listener.getsockname()[1]
    name = f"[{settings.listen}]" if ":" in settings.listen else settings.listen
    report(f"dashboard on {scheme}://{name}:{bound}")
    watch = Watch(source, settings.alerts)
    watch.start()
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            date_header=False,
            proxy_headers=False,
            ws="none",
            limit_concurrency=64,
            timeout_keep_alive=10,
            h11_max_incomplete_event_size=16_384,
            timeout_graceful_shutdown=3,
            ssl_certfile=settings.certificate if settings.tls else None,
            ssl_keyfile=settings.key if settings.tls else None,
        )
    )
    if beside is not None:
        threading.Thread(target=_end_with, args=(beside, server), daemon=True).start()
    try:
        server.run(sockets=[listener])
    finally:
        watch.close()
        listener.close()


def new_password(location: str | None, folder: ServerFolder | None) -> str:
    """A new password of ``admin``, for whoever may write the store.

    Args:
        location: of the store; ``None``: the server's.
        folder: of the server; ``None``: a store alone.
    """
    from umbel.deploy.dashboard.users import Users

    return Users(_store(location, folder)).reset_admin()


def _store(location: str | None, folder: ServerFolder | None) -> str:
    return location or str(folder.store if folder is not None else "runs")


class Beside:
    """A dashboard beside a server: a process of its own, started again when it ends.

    Whatever it does, the server goes on.
    """

    def __init__(self, folder: ServerFolder, report: Callable[[str], None]) -> None:
        self._folder = folder
        self._report = report
        self._closing = threading.Event()
        self._process: subprocess.Popen[str] | None = None
        self._thread = threading.Thread(target=self._run, name="dashboard", daemon=True)

    def start(self) -> None:
        """Begins."""
        self._thread.start()

    def close(self) -> None:
        """Ends it."""
        self._closing.set()
        process = self._process
        if process is not None and process.poll() is None:
            process.terminate()
        self._thread.join(15)

    def _run(self) -> None:
        program = "import sys; from umbel.cli.main import main; sys.exit(main())"
        command = [sys.executable, "-P", "-c", program, "dashboard", "--beside"]
        pause = RETRY_SECONDS
        while not self._closing.is_set():
            with (self._folder.logs / "dashboard.log").open("a", encoding="utf-8") as log:
                self._process = subprocess.Popen(
                    [*command, str(os.getpid()), "--folder", str(self._folder.path)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.PIPE,
                    text=True,
                    start_new_session=True,
                )
                self._hear(self._process, log.write)
            if self._closing.is_set():
                return
            self._report(f"the dashboard ended; again in {pause:g} s")
            self._closing.wait(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _hear(self, process: subprocess.Popen[str], write: Callable[[str], int]) -> None:
        assert process.stderr is not None
        with process.stderr:
            for line in process.stderr:
                write(line)
                if line.startswith(("dashboard on", "error:")):
                    self._report(line.strip())
        process.wait()


def _end_with(parent: int, server: Any) -> None:
    while os.getppid() == parent:
        time.sleep(PARENT_SECONDS)
    server.should_exit = True


def _listen(settings: DashboardSettings, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.listen else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.listen, port))
        listener.listen()  # whoever is told the address may call at once
    except OSError as error:
        listener.close()
        raise InputError(
            f"cannot listen on {settings.listen}:{port}: {error.strerror}",
            where="dashboard",
            fix="choose another --port, or end what listens there",
        ) from None
    return listener
