"""Plans that were found on this machine, so that the next run need not look for them again.

A file that cannot be read or written costs a trial and is not an error.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch

from umbel.client.training import ClientRuntime
from umbel.core.payloads import canonical_json
from umbel.core.versions import versions
from umbel.simulations.kernels.kernel import Subject
from umbel.tasks.task import Batch

KEPT = 500
"""Plans in the file; the oldest go first."""

LITTLE = 1000
"""Work up to which a run's length has no say in its plan: none is long enough to compile steps."""


def path() -> Path:
    """The file: in ``$XDG_CACHE_HOME``, or in ``~/.cache``."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "umbel" / "engine-plans.json"


def key(subject: Subject, batch: Batch, clients: int, work: float) -> str:
    """What a plan depends on: the model, how it is trained, on what, where, with which torch.

    Args:
        subject: what is trained.
        batch: examples, for their shapes.
        clients: how many train in a round.
        work: how much there is to do in the run, in any unit; its power of ten counts, from
            :data:`LITTLE` on. So short runs of one model share a plan, and end with the same bits.
    """
    runtime, now = subject.runtime, versions()
    parts = {
        "model": [
            str(subject.module),
            [[n, list(p.shape), p.requires_grad] for n, p in subject.module.named_parameters()],
        ],
        "client": runtime.run.client.model_dump(mode="json"),
        "rule": [
            getattr(part, "__qualname__", type(part).__qualname__)
            for part in (*runtime.rule.loss_terms, *runtime.rule.grad_transforms)
        ],
        "examples": {name: [list(c.shape), str(c.dtype)] for name, c in batch.items()},
        "clients": clients,
        "work": round(math.log10(max(work, LITTLE))),
        "privacy": None if runtime.private is None else runtime.run.privacy.clipping,
        "machine": _machine(runtime),
        "versions": [now["umbel"], now.get("commit"), now["torch"]],
    }
    return hashlib.sha256(canonical_json(parts).encode()).hexdigest()


def recall(key: str) -> dict[str, Any] | None:
    """What was stored under ``key``, or ``None``."""
    found = _read().get(key)
    return found if isinstance(found, dict) else None


def remember(key: str, value: dict[str, Any]) -> None:
    """Stores ``value``; other processes see the file before or after, never in between."""
    entries = _read()
    entries.pop(key, None)
    entries[key] = value
    target = path()
    with contextlib.suppress(OSError):
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=target.parent, suffix=".json", delete=False, encoding="utf-8"
        ) as file:
            json.dump(dict(list(entries.items())[-KEPT:]), file, indent=1)
        os.replace(file.name, target)


def _read() -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        entries = json.loads(path().read_text(encoding="utf-8"))
        if isinstance(entries, dict):
            return entries
    return {}


def _machine(runtime: ClientRuntime) -> list[object]:
    if runtime.device.type == "cuda":
        return [torch.cuda.get_device_name(runtime.device)]
    capability = torch.backends.cpu.get_cpu_capability()
    return [
        platform.node(),
        platform.machine(),
        capability,
        os.cpu_count(),
        torch.get_num_threads(),
    ]
