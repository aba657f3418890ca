"""What every program of this folder is given and gives back; needs NumPy alone.

The programs are no modules of Umbel: each runs as ``python PROGRAM SETTINGS.json`` in the
environment of the system that it measures, where Umbel is not installed. Before round 1 and at the
end of each round a program says so on stdout; the time is that of the system-wide clock, so that
whoever started the process can count from its start.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

MARK = "@bench "


class Work(NamedTuple):
    """The work, and where its files are.

    Args:
        model: ``cnn`` or ``logistic``.
        data: .npz with x (clients * examples, …) and y; the rows of a client stand together.
        init: .npz with the initial parameters, by PyTorch's names and shapes.
        final: .npz to write the trained parameters to, by the same names.
        clients: how many there are.
        examples: of each client.
        cohort: clients a round, drawn without replacement.
        batch: examples a step.
        epochs: passes over a client's examples in a round, or
        steps: how many steps instead.
        lr: of plain SGD.
        rounds: how many.
        device: ``cpu`` or ``cuda``.
        options: what this system is started with.
    """

    model: str
    data: str
    init: str
    final: str
    clients: int
    examples: int
    cohort: int
    batch: int
    epochs: int | None
    steps: int | None
    lr: float
    rounds: int
    device: str
    options: Mapping[str, Any]


def work(path: str | None = None) -> Work:
    """The work that the command line, or ``path``, names."""
    return Work(**json.loads(Path(path or sys.argv[1]).read_text(encoding="utf-8")))


def arrays(w: Work) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """x (clients, examples, …) and y (clients, examples)."""
    with np.load(w.data) as file:
        x, y = file["x"], file["y"]
    shape = (w.clients, w.examples)
    return x.reshape(*shape, *x.shape[1:]), y.reshape(shape)


def initial(w: Work) -> dict[str, npt.NDArray[np.float32]]:
    """The initial parameters."""
    with np.load(w.init) as file:
        return {name: file[name] for name in file.files}


def began() -> None:
    """Round 1 begins."""
    tell(round=0)


def ended(number: int) -> None:
    """Round ``number`` has ended: the new global model is there."""
    tell(round=number)


def finish(w: Work, params: Mapping[str, Any], *packages: str) -> None:
    """Hands the trained parameters back, and the versions of ``packages``."""
    given: dict[str, Any] = {name: np.asarray(value) for name, value in params.items()}
    np.savez(w.final, **given)
    tell(versions={name: version(name) for name in packages})


def tell(**facts: Any) -> None:
    """One line on stdout, among whatever else is printed there."""
    sys.stdout.write(f"\n{MARK}{json.dumps({'time': time.monotonic(), **facts})}\n")
    sys.stdout.flush()
