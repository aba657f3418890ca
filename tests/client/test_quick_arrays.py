"""Quick arrays: the bytes that Flower writes, the arrays that it reads."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import Array

from umbel.client.flower import quick_arrays

pytestmark = pytest.mark.flower

VALUES = [
    np.arange(12, dtype=np.float32).reshape(3, 4),
    np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    np.arange(12)[::3],
    np.ones((1, 3), np.float16),
    np.array(3.5),
    np.zeros((0, 4), np.int64),
    np.array([True, False]),
    np.arange(3, dtype=">i4"),
    np.array(["a", "bc"]),
    np.ma.masked_array([1.0, 2.0], [True, False]),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda v: f"{v.dtype}{v.shape}")
def test_flowers_bytes_and_arrays(value: np.ndarray) -> None:  # type: ignore[type-arg]
    for _ in range(2):  # with a header that is new, and one that was seen
        expected, made = Array.from_numpy_ndarray(value), quick_arrays.from_numpy_ndarray(value)
        assert type(made) is Array
        assert made == expected
        assert made.object_id == expected.object_id
        found = quick_arrays.numpy(made)
        assert (found.dtype, found.shape) == (value.dtype, value.shape)
        assert found.flags.writeable
        np.testing.assert_array_equal(found, expected.numpy())


def test_what_flower_refuses_is_refused() -> None:
    with pytest.raises(ValueError, match="Object arrays"):
        quick_arrays.from_numpy_ndarray(np.array([None]))
    array = quick_arrays.from_numpy_ndarray(np.arange(3))
    array.data = array.data[:-1]
    with pytest.raises(ValueError, match=r"reshape|EOF"):
        quick_arrays.numpy(array)
    array.stype = "other"
    with pytest.raises(TypeError, match="Unsupported serialization type"):
        quick_arrays.numpy(array)
