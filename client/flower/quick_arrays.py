"""In a process of its own, an app's arrays go to bytes and back by :mod:`umbel.core.npy`.

A small client spends a fifth of its time on the headers of ``.npy``: Flower has NumPy parse and
format each anew. Here Flower's ``Array`` is given the short way, for as long as the process lives;
the bytes, the arrays and the types are the same, and what is not simple goes Flower's way.
"""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
from flwr.app import Array
from flwr.common.constant import SType

from umbel.core import npy

_numpy, _from_numpy = Array.numpy, Array.from_numpy_ndarray


def quicken() -> None:
    """Changes this process; call it only where all of the process is one app's."""
    for name, short in (("numpy", numpy), ("from_numpy_ndarray", staticmethod(from_numpy_ndarray))):
        setattr(Array, name, short)


def numpy(array: Array) -> npt.NDArray[Any]:
    """What ``Array.numpy`` returns."""
    found = npy.read(array.data) if array.stype == SType.NUMPY else None
    if found is None:
        found = _numpy(array)
    return found


def from_numpy_ndarray(ndarray: npt.NDArray[Any]) -> Array:
    """What ``Array.from_numpy_ndarray`` returns."""
    data = npy.write(ndarray)
    if data is None:
        return _from_numpy(ndarray)
    made = object.__new__(Array)
    made.dtype, made.shape = str(ndarray.dtype), tuple(ndarray.shape)
    made.stype, made.data = SType.NUMPY, data
    return made
