"""What a split is given, and how it answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from umbel.core.errors import InputError
from umbel.core.randomness import U64, key, mix
from umbel.datasets.federated import Holdings


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
        return mix(key(self.seed, "split", purpose), np.arange(len(self), dtype=np.uint64))


def by_client(client: npt.NDArray[np.integer[Any]], clients: int) -> Holdings:
    """Holdings from the client of each row, shape (rows,): every row is in exactly one.

    A client's rows keep their order.
    """
    offsets = np.zeros(clients + 1, dtype=np.int64)
    np.cumsum(np.bincount(client, minlength=clients), out=offsets[1:])
    return Holdings(offsets, np.argsort(client, kind="stable").astype(np.int32))


def in_turn(order: npt.NDArray[np.integer[Any]], sizes: npt.NDArray[np.int64]) -> Holdings:
    """Deals the rows in this order: the first ``sizes[0]`` to client 0, and so on."""
    client = np.empty(len(order), dtype=np.int64)
    client[order] = np.repeat(np.arange(len(sizes)), sizes)
    return by_client(client, len(sizes))


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
