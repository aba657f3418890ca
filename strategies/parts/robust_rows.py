"""The updates of a cohort as the rows of a matrix that is never made whole.

Distances between rows are all that robust rules must know of them as a whole; they come from a Gram
matrix, which is summed in float64 over chunks of columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from umbel.core.errors import InputError
from umbel.core.payloads import Updates
from umbel.core.trees import Tree, unflatten
from umbel.strategies.parts.combine import Combined, Combiner

CHUNK = 1 << 20
"""Values of a chunk of columns: 8 MiB in float64."""

ROUNDING = 1e-12
"""Of a sum of squares of many float64; so that duplicates are at no distance, on every machine."""


class Cohort(NamedTuple):
    """The updates of a round as they came; nothing is copied."""

    parts: Sequence[Updates]

    def clients(self) -> list[str]:
        """Who sent them, in the order of their rows: by name, whoever answered first."""
        return sorted(client for part in self.parts for client in part.clients)

    def chunks(self, names: Sequence[str]) -> Iterator[tuple[str, slice, Tensor]]:
        """Columns of the matrix: (name of the tensor, which of its values, (n, c) float64)."""
        came = [client for part in self.parts for client in part.clients]
        order = sorted(range(len(came)), key=came.__getitem__)
        width = max(1, CHUNK // len(order))
        for name in names:
            stacks = [part.delta[name].reshape(len(part.clients), -1) for part in self.parts]
            for start in range(0, stacks[0].shape[1], width):
                where = slice(start, start + width)
                chunk = torch.cat([stack[:, where] for stack in stacks])
                yield name, where, chunk[order].cpu().double()

    def columns(
        self, like: Tree, names: Sequence[str], combine: Callable[[Tensor], Tensor]
    ) -> dict[str, Tensor]:
        """``combine``, (n, c) float64 -> (c,), on all columns: name -> the shape in ``like``."""
        found = {name: torch.empty(like[name].numel(), dtype=torch.float64) for name in names}
        for name, where, chunk in self.chunks(names):
            found[name][where] = combine(chunk)
        return {name: values.reshape(like[name].shape) for name, values in found.items()}


def gather(
    finish: Callable[[Cohort, Tree, Sequence[str]], dict[str, Tensor]],
    fewest: int,
    owner: str,
    needs: str,
) -> Combiner:
    """A combiner that keeps every update until the end.

    Args:
        finish: (cohort, the global tensors, names of the floating ones) -> name -> (*shape),
            float64; and what a server step needs besides, as ``letter/name``. Integers and booleans
            take the median over the clients.
        fewest: updates without which there is no result.
        owner: the strategy with its parameters, for the error.
        needs: the bound as the paper says it.
    """

    def zero(model: Tree) -> tuple[Cohort, Tree]:
        return Cohort(()), model

    def add(gathered: tuple[Cohort, Tree], updates: Updates) -> tuple[Cohort, Tree]:
        return Cohort((*gathered[0].parts, updates)), gathered[1]

    def close(gathered: tuple[Cohort, Tree]) -> Combined:
        cohort, model = gathered
        n = len(cohort.clients())
        if n < fewest:
            raise InputError(
                f"{owner} needs {fewest} or more updates ({needs}), and there are {n}",
                where="[strategy]",
                fix=f"a cohort of {fewest} or more clients, or a lower f",
            )
        floating = [name for name, tensor in model.items() if tensor.dtype.is_floating_point]
        found = finish(cohort, model, floating)
        found |= cohort.columns(model, [n for n in model if n not in found], median)
        weight = float(sum(part.weights.sum() for part in cohort.parts))
        extra = unflatten({name: value for name, value in found.items() if "/" in name})
        return Combined(found, weight, n, extra)

    return Combiner(zero, add, None, close, fewest)


def gram(
    cohort: Cohort, names: Sequence[str], scale: Tensor | None = None, origin: int | None = None
) -> Tensor:
    """(n, n) float64: inner products of the scaled rows, seen from the row ``origin`` or zero."""
    n = len(cohort.clients())
    total = torch.zeros(n, n, dtype=torch.float64)
    for _, _, rows in cohort.chunks(names):
        if scale is not None:
            rows = rows * scale[:, None]
        if origin is not None:
            rows = rows - rows[origin]
        total += rows @ rows.T
    return (total + total.T) / 2  # to the bit: a tie must be one from both sides


def centred_gram(cohort: Cohort, names: Sequence[str], scale: Tensor) -> Tensor:
    """The Gram matrix around the row that lies most in the middle.

    Distances are differences of its entries: around zero these would lose what all rows have in
    common, and around the mean one huge row would drown all others.
    """
    distances = squared_distances(gram(cohort, names, scale))
    middle = int(distances.median(1).values.argmin())
    return gram(cohort, names, scale, middle)


def squared_distances(around: Tensor) -> Tensor:
    """(n, n) from a Gram matrix around any origin; what is below its rounding is zero."""
    norms = around.diagonal()
    sums = norms[:, None] + norms[None, :]
    found = sums - 2 * around
    return torch.where(found > ROUNDING * sums, found, 0.0)


def median(rows: Tensor) -> Tensor:
    """(n, c) -> (c,): the median of each column; for even n the mean of the two in the middle."""
    n = len(rows)
    ordered = rows.sort(0).values
    return ordered[(n - 1) // 2] / 2 + ordered[n // 2] / 2


def mean(rows: Tensor) -> Tensor:
    """(n, c) -> (c,): the mean of each column."""
    return rows.mean(0)


def nearest_median(rows: Tensor, keep: int) -> Tensor:
    """(n, c) -> (c,): the mean of the ``keep`` values of each column that are nearest its median.

    In sorted order these are neighbours, so the best of n - keep + 1 windows is looked for. Of two
    values equally near, the smaller one is kept.
    """
    n = len(rows)
    ordered = rows.sort(0).values
    centre = ordered[(n - 1) // 2] / 2 + ordered[n // 2] / 2
    # A window is at its place when what it would gain above is farther away than its lowest value.
    farther = centre - ordered[: n - keep] > ordered[keep:] - centre
    start = farther.cumprod(0).sum(0)
    index = start[None] + torch.arange(keep)[:, None]
    return ordered.gather(0, index).mean(0)
