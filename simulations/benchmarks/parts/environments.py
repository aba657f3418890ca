"""Peers that cannot live beside Umbel get an environment of their own, made once."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from umbel.core.errors import RunError


def requirements() -> dict[str, list[str]]:
    """What each environment holds; PyTorch in the version that Umbel runs on."""
    from importlib.metadata import version

    torch = version("torch").partition("+")[0]
    return {
        "pfl": ["pfl[pytorch]==0.6.*", f"torch=={torch}"],
        # FedJAX's last release runs unchanged on JAX of its time. On a new JAX, with one lost name
        # put back, it is faster on convolutions and slower on small models: both are measured.
        "fedjax": [
            "fedjax==0.0.17",
            "jax==0.4.30",
            "jaxlib==0.4.30",
            "dm-haiku==0.0.12",
            "numpy<2",
            "scipy<1.13",
        ],
        "fedjax-new": ["fedjax==0.0.17", "jax==0.10.2", "jaxlib==0.10.2"],
    }


def python(name: str, folder: Path | None, announce: Callable[[str], None]) -> str:
    """The interpreter of environment ``name``, which is made where it is missing.

    Args:
        name: a key of :func:`requirements`.
        folder: of all environments; ``None``: ``umbel/bench`` in the user's cache.
        announce: told when something takes long.

    Raises:
        RunError: it cannot be made, offline for example; what pip said is in the message.
    """
    wanted = requirements()[name]
    digest = hashlib.sha256("\n".join([sys.version, *wanted]).encode()).hexdigest()[:8]
    place = (folder or cache()) / f"{name}-{digest}"
    interpreter, done = place / "bin" / "python", place / "complete"
    if not done.exists():
        announce(f"making an environment for {', '.join(wanted)}: minutes, once, in {place}")
        _call([sys.executable, "-m", "venv", "--clear", str(place)], name)
        pip = [str(interpreter), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        _call([*pip, *wanted], name)
        done.touch()
    return str(interpreter)


def cache() -> Path:
    """Where this user's caches belong."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "umbel" / "bench"


def _call(command: Sequence[str], name: str) -> None:
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        lines = (answer.stderr or answer.stdout).strip().splitlines()
        said = next((x for x in lines if x.lower().startswith("error")), "no message")
        raise RunError(f"no environment for {name}: {said}", where=command[0])
