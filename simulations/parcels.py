"""Values with tensors, written so that Ray moves the bytes of the tensors as they are."""

from __future__ import annotations

import io
import pickle
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


class Parcel(NamedTuple):
    """A value in two parts.

    Args:
        rest: pickled, with a number, type and shape in place of each tensor.
        buffers: the bytes of the tensors.
    """

    rest: bytes
    buffers: list[npt.NDArray[np.uint8]]


def pack(value: Any) -> Parcel:
    """Puts a value, which may hold CPU tensors anywhere, into a parcel; their memory is shared."""
    document = io.BytesIO()
    writer = _Writer(document)
    writer.dump(value)
    return Parcel(document.getvalue(), writer.buffers)


def unpack(parcel: Parcel) -> Any:
    """The inverse of :func:`pack`. Its tensors are copies: Ray's memory must not be written to."""
    return _Reader(io.BytesIO(parcel.rest), parcel.buffers).load()


class _Writer(pickle.Pickler):
    def __init__(self, document: io.BytesIO) -> None:
        super().__init__(document, pickle.HIGHEST_PROTOCOL)
        self.buffers: list[npt.NDArray[np.uint8]] = []

    def persistent_id(self, value: Any) -> Any:
        """What stands for a tensor; ``None``: it is pickled as everything else."""
        if not isinstance(value, Tensor) or value.device.type != "cpu" or not value.numel():
            return None
        self.buffers.append(_bytes(value.detach().contiguous()))
        return len(self.buffers) - 1, value.dtype, tuple(value.shape)


class _Reader(pickle.Unpickler):
    def __init__(self, document: io.BytesIO, buffers: list[npt.NDArray[np.uint8]]) -> None:
        super().__init__(document)
        self._buffers = buffers

    def persistent_load(self, at: Any) -> Tensor:
        """The tensor that was put there."""
        number, dtype, shape = at
        tensor = torch.empty(shape, dtype=dtype)
        _bytes(tensor)[:] = self._buffers[number]
        return tensor


def _bytes(tensor: Tensor) -> npt.NDArray[np.uint8]:
    """The memory of a contiguous tensor."""
    found: npt.NDArray[np.uint8] = tensor.view(-1).view(torch.uint8).numpy()
    return found
