"""NumPy's ``.npy``, for many small arrays of few shapes: each header is parsed and written once.

What is simple goes the short way: version 1.0, C order, numbers, at least one of them. Of anything
else these functions say so, and whoever asks takes NumPy's own.
"""

from __future__ import annotations

import math
from functools import lru_cache
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt

_MAGIC = b"\x93NUMPY\x01\x00"
_START = len(_MAGIC)


def read(data: bytes) -> npt.NDArray[Any] | None:
    """The array that ``np.load`` reads from ``data``, a copy; ``None``: not simple or cut short."""
    if not data.startswith(_MAGIC):
        return None
    end = _START + 2 + int.from_bytes(data[_START : _START + 2], "little")
    shape, fortran, dtype = _parsed(data[_START:end])
    count = math.prod(shape)
    if not count or fortran or dtype.hasobject or len(data) < end + count * dtype.itemsize:
        return None
    flat: npt.NDArray[Any] = np.frombuffer(data, dtype, count, end)
    return flat.reshape(shape).copy()


def write(array: npt.NDArray[Any]) -> bytes | None:
    """The bytes that ``np.save`` writes of ``array``; ``None``: not simple."""
    if type(array) is not np.ndarray or array.dtype.kind not in "biufc" or not array.size:
        return None
    if not array.flags.c_contiguous:
        return None
    return _written(array.shape, array.dtype) + array.tobytes()


@lru_cache(maxsize=256)
def _parsed(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    return np.lib.format.read_array_header_1_0(BytesIO(header))


@lru_cache(maxsize=256)
def _written(shape: tuple[int, ...], dtype: np.dtype[Any]) -> bytes:
    file = BytesIO()
    form = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, form)
    return file.getvalue()
