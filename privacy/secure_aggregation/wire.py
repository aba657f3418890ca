"""Strict reading of canonical bytes: one encoding for one message, every length checked first."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from functools import lru_cache
from itertools import chain
from operator import lt

from umbel.privacy.secure_aggregation.refusals import Reason, Refused

Entry = tuple[int, bytes]  # a member and the bytes that concern it


class Reader:
    """Takes values off the front of ``data``; anything missing or left over is a refusal."""

    def __init__(self, data: bytes) -> None:
        self._data = memoryview(data)
        self._at = 0

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

    def entries(self, size: int) -> tuple[Entry, ...]:
        """A counted list of (member, ``size`` bytes), strictly ascending by member."""
        count = self.number(4)
        if (4 + size) * count > len(self._data) - self._at:
            raise Refused(Reason.MALFORMED, f"a list of {count} entries is cut short")
        pairs = tuple(struct.iter_unpack(f">I{size}s", self.take((4 + size) * count)))
        ascending([member for member, _ in pairs])
        return pairs

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
    listed = tuple(entries)
    size = len(listed[0][1]) if listed else 0
    layout = ">I" + f"I{size}s" * len(listed)  # one call: there are n·k entries in a round
    return struct.pack(layout, len(listed), *chain.from_iterable(listed))
