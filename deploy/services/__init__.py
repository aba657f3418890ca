"""What keeps a server or a site running: a systemd unit and a compose file, for its own folder."""

from __future__ import annotations

import getpass
import json
import os
import re
import sys
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Literal

import umbel

FOLDER = "service"

SHOWN = "keys"
"""In it, an empty folder that a container sees in place of the keys, with the secrets put into it:
a tmpfs would be root's, and not every engine can give it to the container's user."""


def write_services(
    kind: Literal["server", "site"], folder: Path, *, port: int = 0, data: Path | None = None
) -> None:
    """Writes ``umbel-server.service`` (or ``-site``) and ``compose.yaml`` into ``folder/service``.

    Args:
        kind: which.
        folder: of the server or the site.
        port: the server's.
        data: the site's, which its container may read.
    """
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a user without a name, as in containers
        user = str(os.getuid())
    beside = Path(sys.executable).parent / "umbel"
    at_home = folder.is_relative_to("/home") or folder.is_relative_to("/root")
    values = {
        "folder": str(folder),
        "shown": str(folder / FOLDER / SHOWN),
        "project": re.sub(r"[^a-z0-9_-]", "-", f"umbel-{folder.name}".lower()),
        "parent": str(folder.parent),
        "umbel": str(beside),
        "user": user,
        "uid": os.getuid(),
        "gid": os.getgid(),
        "port": port,
        "image": f"umbel-{kind}:{umbel.__version__}",
        "data": "" if data is None else f", {json.dumps(f'{data}:{data}:ro')}",
        # The folder of a user's home must stay in sight.
        "home": "ProtectHome=tmpfs\nBindPaths=" + str(folder) if at_home else "ProtectHome=yes",
    }
    made = folder / FOLDER
    made.mkdir(mode=0o700, exist_ok=True)
    (made / SHOWN).mkdir(mode=0o700, exist_ok=True)
    values["hardening"] = _filled("hardening", values)
    (made / f"umbel-{kind}.service").write_text(_filled(f"{kind}.service", values))
    (made / "compose.yaml").write_text(_filled(f"{kind}.compose.yaml", values))


def _filled(name: str, values: dict[str, object]) -> str:
    text = files(__package__).joinpath(name).read_text(encoding="utf-8")
    return Template(text).substitute(values)
