"""A dashboard beside a server: there while the server is, gone when it is killed."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import httpx

from umbel.deploy import provisioning
from umbel.deploy.server_folder import ServerFolder

PARENT = """
import sys, time
from pathlib import Path
from umbel.deploy.dashboard.serve import Beside
from umbel.deploy.server_folder import ServerFolder
beside = Beside(ServerFolder(Path(sys.argv[1])), lambda text: print(text, flush=True))
beside.start()
if sys.argv[2] == "close":
    sys.stdin.readline()
    beside.close()
else:
    time.sleep(600)
"""


def answers(address: str) -> bool:
    try:
        return httpx.get(f"{address}/healthz", timeout=30).json() == {"status": "ok"}
    except httpx.ConnectError:
        return False


def gone(address: str) -> bool:
    until = time.monotonic() + 120
    while answers(address):
        if time.monotonic() > until:
            return False
        time.sleep(0.2)
    return True


def test_it_ends_with_its_server_however_that_ends(tmp_path: Path) -> None:
    folder = ServerFolder(tmp_path / "server")
    provisioning.init_server(folder, ["localhost"], 9443)
    (folder.path / "dashboard.toml").write_text("port = 0\n")
    for end in ("close", "kill"):
        parent = subprocess.Popen(
            [sys.executable, "-c", PARENT, str(folder.path), end],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert parent.stdout is not None
        line = parent.stdout.readline()
        assert line.startswith("dashboard on http://127.0.0.1:"), line
        address = line.removeprefix("dashboard on ").strip()
        assert answers(address)
        if end == "close":
            parent.communicate("\n", timeout=120)
        else:
            parent.kill()
            parent.wait()
            parent.stdout.close()
        assert gone(address)
    log = (folder.logs / "dashboard.log").read_text()
    assert "Traceback" not in log
