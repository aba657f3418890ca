"""A run of an audit, from its tables to its final model, through the same path as any other."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from umbel.core import run_file
from umbel.core.errors import RunError
from umbel.core.payloads import unpack
from umbel.core.run_file import RunFile
from umbel.core.trees import Tree
from umbel.simulations.simulate import Outcome, ignore, simulate

PARTS = "umbel.simulations.audits.parts"


def trained(
    tables: Mapping[str, Any],
    engine: str = "vectorised",
    announce: Callable[[str], None] = ignore,
) -> tuple[Tree, Outcome]:
    """The final tensors, and how the run ended; nothing stays on disk.

    Raises:
        InputError: as :func:`simulate`.
        RunError: the run ended without a model.
    """
    with tempfile.TemporaryDirectory(prefix="umbel-audit-") as folder:
        here = {**tables.get("run", {}), "name": "audit", "store": folder}
        run = run_file.resolve({**tables, "run": here}, "umbel audit")
        outcome = simulate(run, engine=engine, announce=announce)
        if outcome.model is None:
            raise RunError("no round was done", where="umbel audit", fix="raise the budget")
        tensors, _ = unpack(Path(outcome.model).read_bytes())
    return tensors, outcome


def sections(run: RunFile, *names: str) -> dict[str, Any]:
    """Those sections of a run as tables."""
    return {name: getattr(run, name).model_dump(exclude_none=True) for name in names}


def how(run: RunFile) -> dict[str, Any]:
    """``[run]``, without where it is kept and what it is called."""
    keys = {"seed", "rounds", "processes", "engine_plan"}
    return run.run.model_dump(include=keys, exclude_none=True)


def data(run: RunFile, part: str, **more: Any) -> dict[str, Any]:
    """``[data]`` of an audit: a part of :mod:`umbel.simulations.audits.parts` over the run's."""
    return {
        "name": f"{PARTS}:{part}",
        "of": run.data.model_dump(exclude_none=True),
        "seed": run.run.seed,
        "split": {"kind": "natural"},
        "holdout": 0.0,
        "client_holdout": 0.0,
        **more,
    }
