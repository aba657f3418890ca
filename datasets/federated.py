"""Data as a federation holds it: pooled arrays, and an index of who holds which rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, overload

import numpy as np
import numpy.typing as npt

Arrays: TypeAlias = Mapping[str, npt.NDArray[Any]]
"""Columns of equal first dimension, one row an example; ``x`` and ``y`` where there is a label."""


def rows(arrays: Arrays) -> int:
    """How many examples ``arrays`` hold."""
    return len(next(iter(arrays.values())))


def take(arrays: Arrays, index: npt.NDArray[np.integer[Any]]) -> dict[str, npt.NDArray[Any]]:
    """The examples at ``index``, in its order."""
    return {name: column[index] for name, column in arrays.items()}


@dataclass(frozen=True)
class Info:
    """What a task needs to know of the data.

    Args:
        name: of the data set.
        input_shape: shape of one ``x``, without the batch.
        classes: number of classes, labels 0 … classes-1; ``None`` for real-valued targets.
        targets: for real-valued targets, how many a row has.
        vocabulary: number of symbols where ``x`` holds integers, else ``None``.
        padding: the symbol that fills up short records, at their end; ``None``: all are full.
        mask: the symbol that stands for a hidden one, where the tokenizer has it.
    """

    name: str
    input_shape: tuple[int, ...]
    classes: int | None = None
    targets: int = 1
    vocabulary: int | None = None
    padding: int | None = None
    mask: int | None = None


@dataclass(frozen=True)
class Dataset:
    """What a reader returns.

    Args:
        info: shapes and classes.
        train: training examples. float32 or int64 ``x``; int64 class labels or float32 targets.
        test: the data set's own test part, or ``None``.
        owner: for natural clients, the name of each training example's owner, shape (rows,).
        test_owner: the same for the test part; ``None`` where the test part belongs to nobody.
    """

    info: Info
    train: Arrays
    test: Arrays | None = None
    owner: npt.NDArray[np.str_] | None = None
    test_owner: npt.NDArray[np.str_] | None = None


class Numbered(Sequence[str]):
    """The names ``c000 … c999``: as long as needed, in lexicographic order, made when asked for."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._length = 1 + len(str(max(count - 1, 0)))
        self._form = f"c%0{self._length - 1}d"

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            return [self._form % i for i in range(*place.indices(self._count))]
        if not -self._count <= place < self._count:
            raise IndexError(place)
        return self._form % (place % self._count)

    def index(self, name: Any, start: int = 0, stop: int | None = None) -> int:
        """The place of ``name``, without a search."""
        if isinstance(name, str) and len(name) == self._length and name[0] == "c":
            digits = name[1:]
            if digits.isdecimal() and digits.isascii() and (place := int(digits)) < self._count:
                return place
        raise ValueError(f"no client {name!r}")


@dataclass(frozen=True)
class Holdings:
    """Who holds which rows of some arrays: 8 bytes a client and 4 a row.

    Args:
        offsets: (clients + 1,) int64.
        index: (rows held,) int32; client i holds ``index[offsets[i]:offsets[i + 1]]``.
    """

    offsets: npt.NDArray[np.int64]
    index: npt.NDArray[np.int32]

    @classmethod
    def of(cls, parts: Sequence[npt.NDArray[np.integer[Any]]]) -> Holdings:
        """From one array of rows a client."""
        sizes = np.array([0, *map(len, parts)], dtype=np.int64)
        index = np.concatenate(parts) if len(parts) else np.zeros(0)
        return cls(np.cumsum(sizes), index.astype(np.int32))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def sizes(self) -> npt.NDArray[np.int64]:
        """How many rows each client holds, shape (clients,)."""
        return np.diff(self.offsets)

    def sizes_at(self, places: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """How many rows the clients at these places hold, without a look at the others."""
        return self.offsets[places + 1] - self.offsets[places]

    def of_client(self, place: int) -> npt.NDArray[np.int32]:
        """The rows of the client at ``place``."""
        return self.index[self.offsets[place] : self.offsets[place + 1]]


@dataclass(frozen=True)
class FederatedData:
    """A data set dealt to clients.

    Args:
        info: shapes and classes.
        names: of the clients, in lexicographic order.
        train: pooled training examples.
        train_holdings: who holds which of them; every client holds at least one.
        test: the global test set, which the server may evaluate on, or ``None``.
        client_test: pooled test examples that stay at the clients, or ``None``. A run without
            ``test`` is evaluated on the union of these.
        client_test_holdings: who holds which of them; may be none for some clients.
    """

    info: Info
    names: Sequence[str]
    train: Arrays
    train_holdings: Holdings
    test: Arrays | None
    client_test: Arrays | None
    client_test_holdings: Holdings | None

    def train_part(self, place: int) -> Arrays:
        """The training examples of the client at ``place``."""
        return take(self.train, self.train_holdings.of_client(place))

    def test_part(self, place: int) -> Arrays | None:
        """The test examples of the client at ``place``; ``None`` where it has none."""
        if self.client_test is None or self.client_test_holdings is None:
            return None
        held = self.client_test_holdings.of_client(place)
        return take(self.client_test, held) if len(held) else None
