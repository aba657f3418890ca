"""Memory that a process shares with its workers: tensors are written once and read in place."""

from __future__ import annotations

import io
import mmap
import pickle
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 64


class Arena:
    """Anonymous shared memory: forked workers inherit it, and it is gone when the last one is.

    Nothing of it has a name, so nothing is left in /dev/shm by a process that is killed. Pages are
    taken when they are first written to.

    Args:
        parts: how many equal parts there are.
        size: bytes of a part.
    """

    def __init__(self, parts: int, size: int) -> None:
        self._size = -(-max(size, 1) // ALIGNMENT) * ALIGNMENT
        self._memory = mmap.mmap(-1, parts * self._size)

    def write(self, part: int, value: Any) -> bytes:
        """Puts the tensors of ``value`` into a part; what was there is overwritten.

        Returns:
            the rest, pickled. A tensor for which there is no room is in it, too.
        """
        document = io.BytesIO()
        _Writer(document, self._memory, part * self._size, (part + 1) * self._size).dump(value)
        return document.getvalue()

    def read(self, rest: bytes) -> Any:
        """The inverse of :meth:`write`. Its tensors are the shared memory: nobody may write."""
        return _Reader(io.BytesIO(rest), self._memory).load()


class _Writer(pickle.Pickler):
    def __init__(self, document: io.BytesIO, memory: mmap.mmap, start: int, end: int) -> None:
        super().__init__(document, pickle.HIGHEST_PROTOCOL)
        self._memory, self._next, self._end = memory, start, end

    def persistent_id(self, value: Any) -> Any:
        """Where a tensor was put, or ``None``: it is pickled as everything else."""
        if not isinstance(value, Tensor) or value.device.type != "cpu" or not value.numel():
            return None
        start, size = self._next, value.numel() * value.element_size()
        if start + size > self._end:
            return None
        at = (start, value.dtype, tuple(value.shape))
        _view(self._memory, at).copy_(value.detach())
        self._next = start + -(-size // ALIGNMENT) * ALIGNMENT
        return at


class _Reader(pickle.Unpickler):
    def __init__(self, document: io.BytesIO, memory: mmap.mmap) -> None:
        super().__init__(document)
        self._memory = memory

    def persistent_load(self, at: Any) -> Tensor:
        """The tensor that was put there."""
        return _view(self._memory, at)


def _view(memory: mmap.mmap, at: tuple[int, torch.dtype, tuple[int, ...]]) -> Tensor:
    start, dtype, shape = at
    size = 1
    for length in shape:
        size *= length
    return torch.frombuffer(memory, dtype=dtype, count=size, offset=start).view(shape)
