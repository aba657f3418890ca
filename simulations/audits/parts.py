"""Data of a run file, dealt anew for an audit."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from umbel.core import randomness, run_file, settings
from umbel.datasets.build import load
from umbel.datasets.federated import Dataset, take


def members(seed: int, model: int, examples: int) -> npt.NDArray[np.bool_]:
    """Which of the examples a model is trained on: a fair coin each. Model 0 is the target."""
    key = randomness.key(seed, "audit halves", model)
    return randomness.mix(key, np.arange(examples, dtype=np.uint64)) >= np.uint64(1 << 63)


def picked(*, of: dict[str, Any], seed: int, rows: list[int]) -> Dataset:
    """One client for each of these training examples, which is all that it holds.

    Args:
        of: ``[data]`` of the run.
        seed: of the run.
        rows: positions among the run's training examples, all clients' together.
    """
    base = load(settings.parse(run_file.Data, of, "[data]"), seed)
    train = take(base.train, base.train_holdings.index[np.array(rows)])
    owner = np.array([f"victim-{row:07d}" for row in rows])
    return Dataset(base.info, train, take(train, np.arange(1)), owner=owner)


def half(*, of: dict[str, Any], seed: int, model: int, clients: int) -> Dataset:
    """A random half of a run's training examples, evenly dealt: what one shadow model sees.

    Args:
        of: ``[data]`` of the run.
        seed: of the run.
        model: which half.
        clients: how many hold it.
    """
    base = load(settings.parse(run_file.Data, of, "[data]"), seed)
    index = base.train_holdings.index
    place = np.repeat(np.arange(len(base.names)), base.train_holdings.sizes())
    inside = np.flatnonzero(members(seed, model, len(index)))
    owner = np.array([f"client-{i:05d}" for i in place[inside] % clients])
    train = take(base.train, index[inside])
    return Dataset(base.info, train, take(train, np.arange(1)), owner=owner)
