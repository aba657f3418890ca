"""What a split is given, and how it answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from umbel.core.errors import InputError
from umbel.core.randomness import U64, key, mix, permutation
from umbel.datasets.federated import Holdings

TOGETHER = 4096
"""Clients whose rows are sorted at a time: a million have no more to hold than the index."""


@dataclass(frozen=True)
class Deal:
    """The training examples that a split deals to clients.

    Args:
        x: (rows, *shape), the inputs.
        labels: (rows,) int64 classes; deciles where the targets are real numbers.
        owner: (rows,) names of the natural owners, or ``None``.
        seed: of the run.
    """

    x: npt.NDArray[Any]
    labels: npt.NDArray[np.int64]
    owner: npt.NDArray[np.str_] | None
    seed: int

    def __len__(self) -> int:
        return len(self.labels)

    def hashes(self, purpose: str) -> U64:
        """One hash a row, shape (rows,); sorting by them shuffles."""
        return mix(self._stream(purpose), np.arange(len(self), dtype=np.uint64))

    def shuffled(self, purpose: str) -> npt.NDArray[np.int64]:
        """The rows in the order of their :meth:`hashes`, shape (rows,)."""
        return permutation(self._stream(purpose), len(self))

    def _stream(self, purpose: str) -> np.uint64:
        return key(self.seed, "split", purpose)


def by_client(client: npt.NDArray[np.integer[Any]], clients: int) -> Holdings:
    """Holdings from the client of each row, shape (rows,): every row is in exactly one.

    A client's rows keep their order.
    """
    offsets = np.zeros(clients + 1, dtype=np.int64)
    np.cumsum(np.bincount(client, minlength=clients), out=offsets[1:])
    return Holdings(offsets, np.argsort(client, kind="stable").astype(np.int32))


def in_turn(order: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64]) -> Holdings:
    """Deals the rows in this order: the first ``sizes[0]`` to client 0, and so on.

    A client's rows keep their order in the data.
    """
    offsets = np.zeros(len(sizes) + 1, dtype=np.int64)
    np.cumsum(sizes, out=offsets[1:])
    index = np.empty(len(order), dtype=np.int32)
    for begin in range(0, len(sizes), TOGETHER):
        some = sizes[begin : begin + TOGETHER]
        part = slice(offsets[begin], offsets[begin + len(some)])
        rows = np.repeat(np.arange(len(some)) << 32, some)  # by client, and then by row
        rows |= order[part]
        rows.sort()
        index[part] = rows
    return Holdings(offsets, index)


def even(total: int, parts: int) -> npt.NDArray[np.int64]:
    """Sizes of ``parts`` parts of ``total`` that differ by at most one, shape (parts,)."""
    return np.diff(np.arange(parts + 1, dtype=np.int64) * total // parts)


def require_rows(deal: Deal, clients: int, each: int, what: str = "minimum") -> None:
    """Raises InputError unless there are ``each`` examples for each client."""
    if clients * each > len(deal):
        raise InputError(
            f"{clients} clients with {what} {each} need {clients * each} examples; there are "
            f"{len(deal)} training examples",
            where="[data.split]",
            fix=f"clients ≤ {len(deal) // each}, or a lower {what}"
            if len(deal) // each
            else f"a lower {what}",
        )
