"""Members of a federation as containers on a bridge network of their own, through the Docker API.

Each container sees its own folder and its own data, nothing else of this machine: a read-only root,
no capabilities, no new privileges, not root, and no way out of the network.
"""

from __future__ import annotations

import os
import secrets
import signal
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from umbel.core.errors import RunError
from umbel.deploy.hosting import SWITCHES, Member

SERVER_NAME = "umbel-server"
"""By which sites find the server in their network."""
USER = 10001
"""Whose processes they are where this one is root's; the images' own."""
TEMPORARY = "size=512m,mode=1777"
LIMITS = {"nofile": 1024, "nproc": 1024}

IMAGES = {"server": "umbel-server", "site": "umbel-site"}
BUILD = "docker build -f deploy/containers/Dockerfile --target {kind} -t {image} ."


class Container:
    """A member as a container."""

    def __init__(self, container: Any, follower: threading.Thread) -> None:
        self._container = container
        self._follower = follower

    def poll(self) -> int | None:
        """The exit status; ``None``: it runs."""
        self._container.reload()
        state = self._container.attrs["State"]
        return None if state["Status"] in ("created", "running", "paused") else state["ExitCode"]

    def send(self, number: int) -> None:
        """Sends a signal."""
        from docker.errors import APIError

        try:
            self._container.kill(signal.Signals(number).name)
        except APIError:
            if self.poll() is None:
                raise

    def wait(self, seconds: float) -> int | None:
        """Waits for its end."""
        until = time.monotonic() + seconds
        while (code := self.poll()) is None and time.monotonic() < until:
            time.sleep(0.2)
        if code is not None:
            self._follower.join(5)
        return code

    @property
    def pid(self) -> int:
        """Its first process, as this machine sees it."""
        self._container.reload()
        return int(self._container.attrs["State"]["Pid"])

    @property
    def name(self) -> str:
        """The container's."""
        return str(self._container.name)

    def remove(self) -> None:
        """Takes it away, running or not."""
        self._container.remove(force=True)


class Containers:
    """Members are containers.

    Args:
        images: of ``server`` and ``site``.
        client: of the Docker API; ``None``: as the environment says (``DOCKER_HOST``).
    Raises:
        RunError: no engine answers, or it does not have the images.
    """

    names = (SERVER_NAME, "localhost")
    listen = "0.0.0.0"

    def __init__(self, images: Mapping[str, str] = IMAGES, client: Any = None) -> None:
        self._client = connected() if client is None else client
        for kind, image in images.items():
            self._require(kind, image)
        self._images = images
        self._token = secrets.token_hex(4)
        self._network: Any = None
        self._started: list[Container] = []
        self._user = os.getuid() or USER

    def prepare(self, folder: Path) -> None:
        """Gives the folders to the containers' user, and makes the network."""
        self.adopt(folder)
        self._network = self._client.networks.create(
            f"umbel-{self._token}", driver="bridge", internal=True
        )

    def adopt(self, folder: Path) -> None:
        """Gives what root has made in a folder to the containers' user."""
        if not os.getuid():
            for path in [folder, *folder.rglob("*")]:
                os.chown(path, self._user, self._user, follow_symlinks=False)

    def start(self, member: Member) -> Container:
        """Starts a member."""
        from docker.types import Ulimit

        kind = member.arguments[0]
        folder = str(member.folder)
        volumes = {folder: {"bind": folder, "mode": "rw"}}
        if member.data is not None:
            data = str(member.data.absolute())
            volumes[data] = {"bind": data, "mode": "ro"}
        network = self._network.name
        alias = SERVER_NAME if kind == "server" else member.name
        container = self._client.containers.create(
            self._images[kind],
            list(member.arguments),
            name=f"umbel-{self._token}-{member.name}-{secrets.token_hex(2)}",
            hostname=alias,
            user=f"{self._user}:{self._user}",
            environment={**SWITCHES, "HOME": "/tmp", "FLWR_HOME": "/tmp/flwr"},
            read_only=True,
            tmpfs={"/tmp": TEMPORARY},
            volumes=volumes,
            cap_drop=["ALL"],
            security_opt=["no-new-privileges"],
            ulimits=[Ulimit(name=name, soft=n, hard=n) for name, n in LIMITS.items()],
            network=network,
        )
        self._network.disconnect(container)
        self._network.connect(container, aliases=[alias])
        container.start()
        follower = threading.Thread(
            target=_follow, args=(container, member.log), name=f"log {member.name}", daemon=True
        )
        follower.start()
        started = Container(container, follower)
        self._started.append(started)
        return started

    def cut(self, member: Container) -> Callable[[], None]:
        """Takes a container off the network; the result puts it back."""
        self._network.disconnect(member.name, force=True)
        return lambda: self._network.connect(member.name)

    def close(self) -> None:
        """Removes containers and network."""
        for container in self._started:
            container.remove()
        self._started.clear()
        if self._network is not None:
            self._network.remove()
            self._network = None

    def _require(self, kind: str, image: str) -> None:
        from docker.errors import ImageNotFound

        try:
            self._client.images.get(image)
        except ImageNotFound:
            raise RunError(
                f"the engine has no image '{image}'",
                where="containers",
                fix=f"in Umbel's source: {BUILD.format(kind=kind, image=image)}",
            ) from None


def connected() -> Any:
    """A client of the engine that the environment names.

    Raises:
        RunError: none answers.
    """
    import docker
    from docker.errors import DockerException

    try:
        client = docker.from_env(timeout=120)
        client.ping()
    except DockerException as error:
        raise RunError(
            f"no container engine answers: {error}",
            where=os.environ.get("DOCKER_HOST", "/var/run/docker.sock"),
            fix="start Docker or `podman system service`, or use --with processes",
        ) from None
    return client


def _follow(container: Any, log: Path) -> None:
    with log.open("ab") as file:
        for piece in container.logs(stream=True, follow=True):
            file.write(piece)
            file.flush()
