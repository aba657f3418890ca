"""What may be combined: every task, privacy unit, secure aggregation and family of strategies.

    python -m umbel.simulations.soundness

writes the table that the documentation and ``umbel list tasks`` show. Nothing here decides: a cell
is a small run, and what the table says of it is what a run of that kind is told before it starts
(:func:`umbel.simulations.simulate.check`), that it works, or the reason why it does not. Those
reasons follow from what tasks, models and strategies declare of themselves.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from umbel.core import registry
from umbel.core.errors import InputError, RefusedError
from umbel.core.run_file import RunFile, resolve
from umbel.datasets.build import load
from umbel.datasets.federated import Info
from umbel.simulations.simulate import check
from umbel.tasks.build import build_task

FILE = Path(__file__).parents[1] / "tasks" / "soundness.json"
PLAIN = "classification"
UNITS = ("none", "example", "client")
FAMILIES = {
    "mean": {"name": "fedavg"},
    "with uploads": {"name": "scaffold"},
    "robust": {"name": "median"},
}
"""By what their combiner needs: a mean of deltas, sums of more, or every update by itself."""

GPT = {"name": "gpt", "layers": 1, "width": 8, "heads": 2}
MLP = {"name": "mlp", "hidden": [8]}
DIGITS = {"name": "digits", "split": {"kind": "iid", "clients": 4}, "holdout": 0.8}
CARTPOLES = {"name": "cartpoles", "clients": 4}
PAIRS = {"name": "synthetic-preferences", "clients": 4, "pairs": 8}
PROMPTS = {"name": "synthetic-prompts", "clients": 4, "prompts": 4}
ACTING = {"steps": 4, "copies": 2, "model": MLP}
COMPLETING = {"samples": 2, "length": 2, "model": GPT}


class Cell(NamedTuple):
    """One combination.

    Args:
        task: its kind, and the variant where it has some.
        unit: of privacy.
        secure: whether updates are summed under secure aggregation.
        family: of strategies.
    """

    task: str
    unit: str
    secure: bool
    family: str


def tasks(folder: Path) -> dict[str, dict[str, Any]]:
    """Tables of a small run for every kind of task and its variants.

    Args:
        folder: where files are written that some of them read.
    """
    digits = {"data": DIGITS}
    language = {"data": {"name": "text", "path": str(_texts(folder)), "window": 8}}
    table: dict[str, dict[str, Any]] = {
        "classification": {**digits, "task": {"model": MLP}},
        "classification, BatchNorm": {
            **digits,
            "task": {"model": {"name": f"{__name__}:with_batch_norm"}},
        },
        "regression": {"data": {**DIGITS, "name": "diabetes"}, "task": {"model": MLP}},
        "multi-task": {
            "data": {"name": "npz", "path": str(_parts(folder))},
            "task": {"parts": [0, 0]},
        },
        "few-shot": {**digits, "task": {"ways": 3, "model": MLP}},
        "language-model": {**language, "task": {"model": GPT}},
        "masked-language-model": {**language, "task": {"model": GPT}},
        "language-model, LoRA": {**language, "task": {"model": GPT, "adapter": "lora"}},
        "sequence-classification": {
            "data": {
                "name": "sentences",
                "path": str(_sentences(folder)),
                "window": 8,
                "client": "client",
            },
            "task": {"model": GPT},
        },
        "autoencoder": {**digits, "task": {"model": MLP, "decoder": MLP}},
        "vae": {**digits, "task": {"model": MLP, "decoder": MLP}},
        "gan": {**digits, "task": {"model": MLP, "generator": MLP}},
        "kmeans": {**digits, "task": {"groups": 3}},
        "clip": {**digits, "task": {"model": MLP}},
        "reward": {"data": PAIRS, "task": {"model": GPT}},
        "dpo": {"data": PAIRS, "task": {"model": GPT}},
        "grpo": {"data": PROMPTS, "task": COMPLETING},
        "grpo, scale of the batch": {"data": PROMPTS, "task": {**COMPLETING, "scale": "batch"}},
        "ppo": {"data": PROMPTS, "task": {**COMPLETING, "whitening": False, "kl_target": 0.0}},
        "ppo, whitening": {"data": PROMPTS, "task": {**COMPLETING, "kl_target": 0.0}},
        "ppo, adaptive KL": {"data": PROMPTS, "task": {**COMPLETING, "whitening": False}},
        "behaviour-cloning": {
            "data": {"name": "cartpole-demonstrations", "clients": 4, "steps": 20},
            "task": {"model": MLP},
        },
        "q-learning": {"data": {"name": "grids", "clients": 4}, "task": {"steps": 2, "copies": 2}},
        "dyna": {"data": {"name": "grids", "clients": 4}, "task": {"steps": 2}},
        "dqn": {"data": CARTPOLES, "task": ACTING},
        "a2c": {"data": CARTPOLES, "task": ACTING},
        "reinforce": {"data": CARTPOLES, "task": {"copies": 2, "model": MLP}},
        "ppo-control": {"data": CARTPOLES, "task": ACTING},
    }
    for method in registry.known("methods"):
        model = {"name": "vit", "width": 8, "layers": 1} if method in ("mae", "i-jepa") else MLP
        task = {"method": method, "embedding": 4, "model": model}
        table[f"self-supervised, {method}"] = {**digits, "task": task}
        if method in ("byol", "simsiam"):  # by default, as in their papers, with BatchNorm
            alone = {**task, "method": {"name": method, "norm": "layer"}}
            table[f"self-supervised, {method}, LayerNorm"] = {**digits, "task": alone}
    for name, sections in table.items():
        sections["task"] = {"kind": name.partition(",")[0], **sections["task"]}
    return table


def cells(names: Iterable[str]) -> Iterator[Cell]:
    """Every combination for these tasks."""
    for name, unit, secure, family in itertools.product(names, UNITS, (False, True), FAMILIES):
        yield Cell(name, unit, secure, family)


def run_of(cell: Cell, sections: Mapping[str, Any], folder: Path) -> RunFile:
    """A run of one round for a cell.

    Args:
        cell: which.
        sections: its task's, of :func:`tasks`.
        folder: of the run store.
    """
    private = {"unit": cell.unit, "noise_multiplier": 1.0, "delta": 1e-3}
    return resolve(
        {
            "run": {"name": "cell", "rounds": 1, "store": str(folder), "processes": 0},
            **sections,
            "client": {"lr": 0.01, "batch_size": 2, "local_steps": 1, "device": "cpu"},
            "strategy": {**FAMILIES[cell.family], "weights": "uniform"},
            "privacy": {} if cell.unit == "none" else private,
            "secure_aggregation": {"enabled": cell.secure},
            "evaluate": {"every": 0, "per_client": False},
        }
    )


def verdict(cell: Cell, sections: Mapping[str, Any], folder: Path) -> str:
    """Empty where a combination works, else the reason why it is refused."""
    try:
        check(run_of(cell, sections, folder))
    except (InputError, RefusedError) as refused:
        return refused.message
    return ""


def soundness(folder: Path) -> dict[str, Any]:
    """The table, without what would be said twice.

    A cell works where its task works under the unit, and its family under unit and secure
    aggregation: two tables say it all, which a test holds against every cell.

    Args:
        folder: for small files.

    Returns:
        ``tasks``: name -> ``record`` (what one example is) and unit -> reason, empty where it
        works; ``families``: name -> unit -> [reason without, reason with secure aggregation].
    """
    known = tasks(folder)
    by_task: dict[str, Any] = {}
    for name, sections in known.items():
        run = run_of(Cell(name, "none", False, "mean"), sections, folder)
        by_task[name] = {"record": _record(run)} | {
            unit: verdict(Cell(name, unit, False, "mean"), sections, folder) for unit in UNITS
        }
    by_family = {
        family: {
            unit: [
                verdict(Cell(PLAIN, unit, secure, family), known[PLAIN], folder)
                for secure in (False, True)
            ]
            for unit in UNITS
        }
        for family in FAMILIES
    }
    return {"tasks": by_task, "families": by_family}


def with_batch_norm(info: Info, outputs: int) -> nn.Module:
    """A small network whose layer shares statistics over a batch."""
    wide = int(np.prod(info.input_shape))
    return nn.Sequential(
        nn.Flatten(), nn.Linear(wide, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, outputs)
    )


def _record(run: RunFile) -> str:
    return build_task(run.task, load(run.data, 0).info).unit


def _texts(folder: Path) -> Path:
    place = folder / "texts"
    place.mkdir(exist_ok=True)
    for number in range(4):
        (place / f"author-{number}.txt").write_text("to be or not to be " * 4, encoding="utf-8")
    return place


def _sentences(folder: Path) -> Path:
    file = folder / "sentences.csv"
    lines = [f"{'good' if n % 2 else 'bad'} day,{n % 2},client-{n % 4}" for n in range(32)]
    file.write_text("\n".join(["text,label,client", *lines]) + "\n", encoding="utf-8")
    return file


def _parts(folder: Path) -> Path:
    generator = np.random.default_rng(0)
    x = generator.normal(size=(32, 4)).astype(np.float32)
    file = folder / "parts.npz"
    np.savez(file, x=x, y=x[:, :2] * 2, client=np.repeat(["a", "b", "c", "d"], 8))
    return file


def main() -> None:
    """Writes the table."""
    with tempfile.TemporaryDirectory() as folder:
        table = soundness(Path(folder))
    FILE.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
