"""Who is measured, and how each is started: the settings that its own documents advise."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from umbel.simulations.benchmarks.parts import environments
from umbel.simulations.benchmarks.parts.workloads import WRITTEN, Files, Workload

PEERS = Path(__file__).parents[1] / "peers"


@dataclass(frozen=True)
class System:
    """One row of the table.

    Args:
        name: how the command line calls it.
        title: what it is.
        program: a file of ``peers/``.
        settings: how it is set up, in words.
        options: the program's own.
        environment: whose interpreter runs it; empty: Umbel's own.
        launcher: what stands between the interpreter and the program.
        gpu: whether the program can use one.
    """

    name: str
    title: str
    program: str
    settings: str
    options: Mapping[str, Any] = field(default_factory=dict)
    environment: str = ""
    launcher: tuple[str, ...] = ()
    gpu: bool = False


CORES = os.cpu_count() or 1
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
SYSTEMS = {
    system.name: system
    for system in (
        System(
            "umbel", "Umbel", "run_umbel.py", "as a user gets it: nothing set",
            {"engine": "vectorised"}, gpu=True,
        ),
        System(
            "umbel-lean", "Umbel, lean kernel", "run_umbel.py", "[run] engine_plan = lean",
            {"engine": "vectorised", "plan": "lean"}, gpu=True,
        ),
        System(
            "umbel-bfloat16", "Umbel, bfloat16", "run_umbel.py",
            "[client] precision = bfloat16: forward passes by autocast, float32 parameters",
            {"engine": "vectorised", "precision": "bfloat16"}, gpu=True,
        ),
        System(
            "umbel-sequential", "Umbel, sequential", "run_umbel.py", "--engine sequential",
            {"engine": "sequential"}, gpu=True,
        ),
        System(
            "plain-1", "plain loop, 1 process", "run_plain.py",
            "one thread; model, optimizer and data kept", {"processes": 1}, gpu=True,
        ),
        System(
            "plain-2", "plain loop, 2 processes", "run_plain.py",
            "one thread each; workers live for the run, shared memory, sums per worker",
            {"processes": 2},
        ),
        System(
            "flower", "Flower, tuned", "run_flower.py",
            f"{CORES} Ray actors of one thread; model, optimizer and data kept in them",
            {"actors": CORES, "threads": 1},
        ),
        System(
            "flower-default", "Flower, its defaults", "run_flower.py",
            "no backend configuration, PyTorch's own threads; model and data kept in the actors",
            {"actors": 0, "threads": 0},
        ),
        System(
            "pfl-1", "pfl-research, 1 process", "run_pfl.py", "one thread",
            environment="pfl", gpu=True,
        ),
        System(
            "pfl-2", "pfl-research, 2 processes", "run_pfl.py", "torchrun, one thread each",
            environment="pfl", launcher=TORCHRUN,
        ),
        System(
            "fedjax", "FedJAX, JAX 0.4", "run_fedjax.py", "backend jit, XLA's own threads",
            {"backend": "jit"}, environment="fedjax",
        ),
        System(
            "fedjax-new", "FedJAX, JAX 0.10", "run_fedjax.py",
            "backend jit, XLA's own threads; jax.tree_map, which FedJAX needs, put back",
            {"backend": "jit"}, environment="fedjax-new",
        ),
    )
}  # fmt: skip
USUAL = tuple(name for name in SYSTEMS if name not in ("flower-default", "umbel-bfloat16"))
ON_GPU = tuple(name for name, s in SYSTEMS.items() if s.gpu and name != "umbel-sequential")
QUICK = ("umbel", "plain-1", "plain-2")


def command(
    system: System,
    workload: Workload,
    files: Files,
    folder: Path,
    device: str,
    environments_in: Path | None,
    announce: Callable[[str], None],
) -> list[str]:
    """The command line of one run, its settings written to ``folder``.

    Raises:
        RunError: the system's environment cannot be made.
    """
    interpreter = sys.executable
    if system.environment:
        interpreter = environments.python(system.environment, environments_in, announce)
    settings = {
        "model": name if (name := workload.model["name"]) in WRITTEN else str(files.model),
        "data": str(files.data),
        "init": str(files.init),
        "final": str(folder / "final.npz"),
        "clients": workload.clients,
        "examples": workload.examples,
        "cohort": workload.cohort,
        "batch": workload.batch,
        "epochs": workload.epochs,
        "steps": workload.steps,
        "lr": workload.lr,
        "rounds": workload.rounds,
        "device": device,
        "options": {
            **system.options,
            "run_file": str(files.run_file),
            "store": str(folder / "store"),
        },
    }
    path = folder / "work.json"
    path.write_text(json.dumps(settings), encoding="utf-8")
    return [interpreter, *system.launcher, str(PEERS / system.program), str(path)]


def environment(caches: Path, device: str) -> dict[str, str]:
    """The environment variables of every run: nobody's threads are set from outside.

    Caches of compiled code are empty when the benchmark starts, and kept over its repetitions.
    """
    unset = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "PYTHONPATH", "XLA_FLAGS")
    kept = {name: value for name, value in os.environ.items() if name not in unset}
    return kept | {
        "XDG_CACHE_HOME": str(caches),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "FLWR_HOME": str(caches / "flower"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "JAX_PLATFORMS": "cpu",
        "PFL_PYTORCH_DEVICE": device,
    }
