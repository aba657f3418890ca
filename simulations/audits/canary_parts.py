"""Data and a task with canaries: units whose whole contribution is one coordinate of the model.

The model gets one more layer, a table of one number a canary. A canary's loss is that number times
a large factor, and its real loss counts as zero: its gradient is along its own coordinate, which
nobody else touches, and longer than the clip norm. So each canary is as visible as the mechanism
lets any unit be, and none hides another. Everything else is the run's own: its batches, its
per-example gradients, clipping, noise and sums.

Source: the Dirac canaries of Steinke, Nasr and Jagielski 2023, section 6 (arXiv:2305.08846).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from umbel.core import randomness, run_file, settings
from umbel.core.errors import InputError
from umbel.datasets.build import load
from umbel.datasets.federated import Arrays, Dataset, FederatedData, Info, rows, take
from umbel.tasks.build import build_task
from umbel.tasks.task import Batch, Forward, Task

COLUMN = "canary"
"""Which canary a row is, 0 … count - 1; ``count`` for the rows that are none."""

LAYER = "canaries.weight"
"""The parameter that canaries move, (count + 1, 1); what nobody moves is the last."""

SITE = "site"


def coins(seed: int, count: int) -> npt.NDArray[np.bool_]:
    """Which canaries are in: a fair coin each, from another stream than any of the run's."""
    words = randomness.mix(randomness.key(seed, "audit coins"), np.arange(count, dtype=np.uint64))
    return words >= np.uint64(1 << 63)


def data(*, of: dict[str, Any], count: int, unit: str, seed: int, most: int) -> Dataset:
    """The data of a run with canaries among its units.

    Args:
        of: ``[data]`` of the run.
        count: m, canaries of which each is in or out.
        unit: ``example``: one site, the client with most examples; ``client``: all clients, and
            each canary is one more client.
        seed: of the run and of the coins.
        most: examples that are kept of each client, at the most.
    """
    base = load(settings.parse(run_file.Data, of, "[data]"), seed)
    sizes = base.train_holdings.sizes()
    places = [int(sizes.argmax())] if unit == "example" else range(len(base.names))
    held = [base.train_holdings.of_client(place)[:most] for place in places]
    names = [SITE if unit == "example" else base.names[place] for place in places]
    owner = np.repeat(np.array(names), [len(part) for part in held])
    inside = np.flatnonzero(coins(seed, count))
    train = _with_canaries(take(base.train, np.concatenate(held)), inside, count)
    canary_names = [SITE if unit == "example" else f"canary-{i:06d}" for i in inside]
    test = _with_canaries(_test(base), inside[:0], count)
    owners = np.concatenate([owner, np.array(canary_names, dtype=str)])
    return Dataset(base.info, train, test, owner=owners)


def _test(base: FederatedData) -> Arrays:
    if base.test is not None:
        return base.test
    return base.client_test or take(base.train, base.train_holdings.index[:2])


def _with_canaries(
    arrays: Arrays, inside: npt.NDArray[np.int64], count: int
) -> dict[str, npt.NDArray[Any]]:
    blank = {n: np.zeros((len(inside), *c.shape[1:]), c.dtype) for n, c in arrays.items()}
    found = {n: np.concatenate([c, blank[n]]) for n, c in arrays.items()}
    none = np.full(rows(arrays), count, dtype=np.int64)
    return {**found, COLUMN: np.concatenate([none, inside])}


class WithCanaries(nn.Module):
    """A model, and the table beside it; ``forward(None, which)`` looks up the table."""

    def __init__(self, inner: nn.Module, count: int) -> None:
        super().__init__()
        self.inner = inner
        self.canaries = nn.Embedding(count + 1, 1)
        nn.init.zeros_(self.canaries.weight)

    def forward(self, x: Tensor | None, which: Tensor | None = None) -> Tensor:
        """The model's outputs for ``x``, or the canaries' numbers, (B, 1)."""
        found: Tensor = self.inner(x) if which is None else self.canaries(which)
        return found


def task(
    info: Info, model: run_file.Part | str | None, *, of: dict[str, Any], count: int, scale: float
) -> Task:
    """The task of a run, whose losses know canaries.

    Args:
        info: of the data.
        model: the task's model.
        of: ``[task]`` of the run, without the model.
        count: m.
        scale: length of a canary's gradient before it is clipped.
    """
    inner = build_task(
        settings.parse(run_file.Task, {**of, "model": _table(model)}, "[task]"), info
    )
    if not inner.decomposable:
        raise InputError(
            f"task '{of['kind']}' has no loss of an example by itself",
            where="umbel audit canary",
            fix="audit the mechanism on another task",
        )

    def losses(forward: Forward, batch: Batch) -> Tensor:
        which = batch[COLUMN]
        own = inner.losses(forward, batch)
        moved = -scale * forward(None, which)[:, 0].to(own.dtype)
        return torch.where(which < count, moved, own)

    def metrics(forward: Forward, batch: Batch) -> Mapping[str, Tensor]:
        return inner.metrics(forward, batch)

    return inner._replace(
        build=lambda: WithCanaries(inner.build(), count), losses=losses, metrics=metrics
    )


def _table(model: run_file.Part | str | None) -> Any:
    return model.model_dump() if isinstance(model, run_file.Part) else model
