"""What a server carries between neighbours, as arrays: a round of n members has n·k of each thing.

An edge is a row and a place: from the member of that row to its place-th neighbour. Who sends
writes its row, and whom it is for reads its own row of the edges that lead back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from umbel.privacy.secure_aggregation.wire import Entries

Flags: TypeAlias = npt.NDArray[np.bool_]
Bytes: TypeAlias = npt.NDArray[np.uint8]


class Edges:
    """The graph of a round.

    Args:
        members: ascending, one a row.
        table: the rows of each row's neighbours, ascending, shape (n, k).
    """

    def __init__(self, members: Sequence[int], table: npt.ArrayLike) -> None:
        self.members = tuple(members)
        self.row = {member: row for row, member in enumerate(self.members)}
        rows = np.asarray(table, dtype=np.int64)
        self.rows = rows.reshape(len(self.members), rows.size // max(1, len(self.members)))
        self.numbers = np.array(self.members, dtype=">u4")[self.rows]
        n, k = self.rows.shape
        # Edges in the order of their heads, then tails, are the reverse ones in their own order.
        back = np.empty(n * k, dtype=np.int64)
        back[np.lexsort((np.repeat(np.arange(n), k), self.rows.ravel()))] = np.arange(n * k)
        self.back = back.reshape(n, k)

    def nobody(self) -> Flags:
        """A flag for each member, shape (n,)."""
        return np.zeros(len(self.members), dtype=np.bool_)

    def flags(self, members: Iterable[int]) -> Flags:
        """Those of ``members`` set."""
        found = self.nobody()
        found[[self.row[member] for member in members]] = True
        return found

    def listed(self, flags: Flags) -> tuple[int, ...]:
        """The members whose flag is set, ascending."""
        return tuple([self.members[row] for row in np.flatnonzero(flags).tolist()])

    def between(self, flags: Flags) -> Flags:
        """The edges of which both ends are set, shape (n, k)."""
        return flags[self.rows] & flags[:, None]

    def neighbours(self, mask: Flags) -> dict[int, tuple[int, ...]]:
        """Of each member those at the ends of its edges in ``mask``, shape (n, k)."""
        rows = zip(self.members, self.numbers, mask, strict=True)
        return {member: tuple(numbers[held].tolist()) for member, numbers, held in rows}

    def outbound(self, sent: Mapping[int, Entries], mask: Flags, size: int) -> Bytes:
        """What members sent along their edges of ``mask``, by sender, shape (n, k, size).

        Args:
            sent: by sender, an entry of ``size`` bytes for each of its edges in the mask.
        """
        values = np.zeros((*self.rows.shape, size), dtype=np.uint8)
        there = mask & self.flags(sent)[:, None]
        data = b"".join([sent[member].data for member in self.members if member in sent])
        values[there] = np.frombuffer(data, np.uint8).reshape(-1, 4 + size)[:, 4:]
        return values

    def inbound(self, values: Bytes, mask: Flags) -> dict[int, Entries]:
        """What each member is sent: of each neighbour in its row of ``mask`` what that has for it.

        Args:
            values: by sender, shape (n, k, size). mask: by receiver, shape (n, k).
        """
        n, k, size = values.shape
        table = np.empty((n, k, 4 + size), dtype=np.uint8)
        table[..., :4] = self.numbers.view(np.uint8).reshape(n, k, 4)
        table[..., 4:] = values.reshape(n * k, size)[self.back]
        rows = zip(self.members, table, mask, strict=True)
        return {member: Entries(row[held].tobytes(), size) for member, row, held in rows}
