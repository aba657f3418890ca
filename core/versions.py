"""What a run was made with: the versions that its result depends on."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any


def versions() -> dict[str, Any]:
    """Umbel, Python, torch, numpy, flwr, platform, threads; the commit where Umbel is a checkout.

    Imports nothing heavy; a distribution that is not installed is ``None``.
    """
    from umbel import __version__

    found: dict[str, Any] = {"umbel": __version__, "python": platform.python_version()}
    for name in ("torch", "numpy", "flwr"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    found["platform"] = platform.platform()
    found["threads"] = _threads()
    if commit := _commit(Path(__file__).resolve().parents[1]):
        found["commit"] = commit
    return found


def _threads() -> int:
    # The order of a parallel sum depends on it. torch is asked only where it is loaded anyway.
    torch = sys.modules.get("torch")
    if torch is not None:
        return int(torch.get_num_threads())
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdigit() else os.cpu_count() or 1


def _commit(root: Path) -> str:
    """The commit of the checkout at ``root``, ``-dirty`` appended; empty where it is none."""
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    command += ["--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
