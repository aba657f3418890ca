"""Strict reading of canonical bytes: one encoding for one message, every length checked first."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import chain
from operator import lt
from typing import overload

from umbel.privacy.secure_aggregation.refusals import Reason, Refused

Entry = tuple[int, bytes]  # a member and the bytes that concern it


class Entries(Sequence[Entry]):
    """Entries in the order of their members, kept as they travel: a server carries n·k of them.

    Args:
        data: for each the member, 4 bytes, and its own ``size`` bytes.
    """

    __slots__ = ("_members", "data", "size")

    def __init__(self, data: bytes, size: int) -> None:
        self.data, self.size = data, size
        self._members: tuple[int, ...] | None = None

    @classmethod
    def of(cls, entries: Sequence[Entry], size: int) -> Entries:
        """The same entries, each of ``size`` bytes."""
        return entries if isinstance(entries, Entries) else cls(pack_entries(entries)[4:], size)

    @property
    def members(self) -> tuple[int, ...]:
        """Whom they concern."""
        if self._members is None:
            self._members = _members_of(len(self), self.size).unpack(self.data)
        return self._members

    def __len__(self) -> int:
        return len(self.data) // (4 + self.size)

    def __iter__(self) -> Iterator[Entry]:
        return struct.iter_unpack(f">I{self.size}s", self.data)

    @overload
    def __getitem__(self, at: int) -> Entry: ...
    @overload
    def __getitem__(self, at: slice) -> tuple[Entry, ...]: ...
    def __getitem__(self, at: int | slice) -> Entry | tuple[Entry, ...]:
        return tuple(self)[at]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(tuple(self))


@lru_cache(maxsize=64)
def _members_of(count: int, size: int) -> struct.Struct:
    return struct.Struct(">" + f"I{size}x" * count)


class Reader:
    """Takes values off the front of ``data``; anything missing or left over is a refusal.

    Args:
        at: where the front is.
    """

    def __init__(self, data: bytes, at: int = 0) -> None:
        self._data, self._at = memoryview(data), at

    def take(self, size: int) -> bytes:
        """The next ``size`` bytes."""
        if size > len(self._data) - self._at:
            raise Refused(Reason.MALFORMED, f"the message ends {size} bytes too early or less")
        self._at += size
        return bytes(self._data[self._at - size : self._at])

    def number(self, size: int) -> int:
        """The next ``size`` bytes as an unsigned big-endian number."""
        return int.from_bytes(self.take(size), "big")

    def rest(self) -> memoryview:
        """All that is left, without a copy."""
        left = self._data[self._at :]
        self._at = len(self._data)
        return left

    def members(self) -> tuple[int, ...]:
        """A counted list of member numbers, strictly ascending."""
        count = self.number(4)
        if 4 * count > len(self._data) - self._at:
            raise Refused(Reason.MALFORMED, f"a list of {count} members is cut short")
        return ascending(struct.unpack(f">{count}I", self.take(4 * count)))

    def entries(self, size: int) -> Entries:
        """A counted list of (member, ``size`` bytes), strictly ascending by member."""
        count = self.number(4)
        if (4 + size) * count > len(self._data) - self._at:
            raise Refused(Reason.MALFORMED, f"a list of {count} entries is cut short")
        found = Entries(self.take((4 + size) * count), size)
        ascending(found.members)
        return found

    def finish(self) -> None:
        """Refuses bytes after the end."""
        if self._at != len(self._data):
            raise Refused(
                Reason.MALFORMED, f"{len(self._data) - self._at} bytes follow the message"
            )


def ascending(members: Iterable[int]) -> tuple[int, ...]:
    """``members``, refused where one is listed twice or out of order."""
    listed = tuple(members)
    if not all(map(lt, listed, listed[1:])):
        raise Refused(Reason.DUPLICATE_MEMBER, "a member is listed twice or out of order")
    return listed


@lru_cache(maxsize=16)  # one survivor set goes to all members
def pack_members(members: tuple[int, ...]) -> bytes:
    """A counted list of member numbers."""
    return struct.pack(f">I{len(members)}I", len(members), *members)


def pack_entries(entries: Iterable[Entry]) -> bytes:
    """A counted list of (member, bytes of one size)."""
    if isinstance(entries, Entries):
        return struct.pack(">I", len(entries)) + entries.data
    listed = tuple(entries)
    size = len(listed[0][1]) if listed else 0
    layout = ">I" + f"I{size}s" * len(listed)
    return struct.pack(layout, len(listed), *chain.from_iterable(listed))
