"""From numbers to ring elements and back: every number that a client sends goes under the mask.

A layout lists the fields of the vector: deltas, variates, counts, metrics. Real fields are clipped
to ±bound and rounded to multiples of step = 2·bound / (2^value_bits − 1), up or down at random so
that the mean is right; whole fields are exact. Offsets make all elements 0 … 2^value_bits − 1.

Error: with s clients, |decoded sum − sum of the clipped inputs| < s·step for every number, always;
its mean is 0 and its standard deviation at most √s·step/2. A float64 adds about 1e-16 of the bound.

Source: Connolly, Higham and Mary 2021, stochastic rounding; randomness from AES-CTR under a key of
the operating system, because a rounding that can be guessed shows bits of what was rounded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from umbel.core.errors import InputError
from umbel.privacy.secure_aggregation.keystream import KeyStream, Words, fresh_stream, scratch

Numbers = npt.NDArray[Any]


@dataclass(frozen=True)
class Real:
    """``size`` real numbers, clipped to [-bound, bound]; the unit is that of the input."""

    name: str
    size: int
    bound: float


@dataclass(frozen=True)
class Whole:
    """``size`` whole numbers from ``low`` to ``high``, exact; others are refused, not clipped."""

    name: str
    size: int
    low: int
    high: int


Field = Real | Whole


class Layout:
    """The fields of a vector in their order.

    Args:
        fields: distinct names, sizes from 1.
        value_bits: an element is 0 … 2^value_bits − 1; 1 … 31.
    Raises:
        InputError: a field that the elements cannot hold.
    """

    def __init__(self, fields: Sequence[Field], value_bits: int) -> None:
        self.fields = tuple(fields)
        self.value_bits = value_bits
        self.levels = (1 << value_bits) - 1
        self.size = sum(field.size for field in fields)
        names = [field.name for field in fields]
        _need(
            1 <= value_bits <= 31 and len(set(names)) == len(names) > 0,
            f"value_bits {value_bits} and fields {names}: expected 1 to 31 bits and distinct names",
        )
        for field in fields:
            _need(field.size >= 1, f"field '{field.name}' has size {field.size}, expected 1 up")
            if isinstance(field, Real):
                good = 0 < field.bound < float("inf")
                _need(good, f"field '{field.name}' has bound {field.bound}, expected positive")
            else:
                span = field.high - field.low
                _need(
                    0 < span <= self.levels,
                    f"field '{field.name}' spans {span}, expected 1 to {self.levels} "
                    f"({value_bits} bits)",
                )

    def step(self, field: Real) -> float:
        """The distance between two representable numbers of ``field``."""
        return 2 * field.bound / self.levels

    def error_bound(self, field: Real, clients: int) -> float:
        """No decoded number of a sum over ``clients`` is off by more than this."""
        return clients * self.step(field)

    def encode(self, values: Mapping[str, Numbers], rounding: bytes | None = None) -> Words:
        """The vector of ring elements, shape (size,), from one array of any shape a field.

        Args:
            values: field name -> its numbers.
            rounding: in simulation alone, the 32-byte key that rounding is drawn from, so that a
                run repeats; whoever knows it learns bits of what was rounded. ``None``: a fresh one
                of the operating system.
        Raises:
            InputError: a missing or unknown field, another size, a number that is not finite, a
                whole number out of its range.
        """
        names = [field.name for field in self.fields]
        _need(set(values) == set(names), f"fields {sorted(values)}, expected {sorted(names)}")
        out = np.empty(self.size, dtype="<u4")
        stream = fresh_stream() if rounding is None else KeyStream(rounding)
        start = 0
        for field in self.fields:
            flat = np.asarray(values[field.name]).reshape(-1)
            _need(
                flat.size == field.size,
                f"field '{field.name}' has {flat.size} numbers, expected {field.size}",
            )
            part = out[start : start + field.size]
            if isinstance(field, Real):
                self._round(field, flat, part, stream)
            else:
                _whole(field, flat, part)
            start += field.size
        return out

    def decode(self, total: Words, clients: int) -> dict[str, npt.NDArray[np.float64]]:
        """The sums over ``clients``, by field, from the summed ring elements, shape (size,).

        Whole sums are exact in float64: they stay below 2**32 in absolute offset.
        """
        _need(total.size == self.size, f"{total.size} elements, expected {self.size}")
        sums: dict[str, npt.NDArray[np.float64]] = {}
        start = 0
        for field in self.fields:
            part = total[start : start + field.size].astype(np.float64)
            if isinstance(field, Real):
                part *= self.step(field)
                part -= clients * field.bound
            else:
                part += clients * field.low
            sums[field.name] = part
            start += field.size
        return sums

    def _round(self, field: Real, values: Numbers, out: Words, stream: KeyStream) -> None:
        buffer, words = scratch()
        scaled = np.empty(words.size, dtype=np.float64)
        uniform = np.empty(words.size, dtype=np.float64)
        for start in range(0, values.size, words.size):
            chunk = values[start : start + words.size]
            x, u = scaled[: chunk.size], uniform[: chunk.size]
            x[:] = chunk  # to float64 first: in float32 the bound itself would be rounded
            if not np.isfinite(x).all():
                raise InputError(
                    f"field '{field.name}' holds a number that is not finite",
                    where="secure aggregation payload",
                    fix="leave this client out of the round",
                )
            np.clip(x, -field.bound, field.bound, out=x)
            x += field.bound
            x *= self.levels / (2 * field.bound)
            stream.into(buffer, 4 * chunk.size)
            np.multiply(words[: chunk.size], 2.0**-32, out=u)
            x += u
            # Near the top the addition itself may round up to the next level.
            np.minimum(x, self.levels, out=x)
            out[start : start + chunk.size] = x  # towards zero: the floor of what is not negative
        words[:] = 0


def _whole(field: Whole, values: Numbers, out: Words) -> None:
    whole = values.astype(np.int64)
    if not (
        np.isfinite(values).all()
        and (whole == values).all()
        and (whole >= field.low).all()
        and (whole <= field.high).all()
    ):
        raise InputError(
            f"field '{field.name}' holds numbers that are not whole, or not from {field.low} "
            f"to {field.high}",
            where="secure aggregation payload",
            fix="widen the field, or leave this client out of the round",
        )
    out[:] = whole - field.low


def _need(good: bool, message: str) -> None:
    if not good:
        raise InputError(
            message,
            where="secure aggregation layout",
            fix="state the fields as the sites hold them",
        )
