"""Quick records are Flower's own in all that can be seen, and read what Flower's own read."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import flwr.app
import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.common.constant import SType

from umbel.server.flower import quick_records
from umbel.server.flower.quick_records import quicken

pytestmark = pytest.mark.flower

VALUES = [
    np.arange(12, dtype=np.float32).reshape(3, 4),
    np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    np.array(3.5),
    np.zeros((0, 4), np.int64),
    np.array([True, False]),
    np.arange(3, dtype=">i4"),
    np.array(["a", "bc"]),
]


def both() -> tuple[flwr.app.RecordDict, flwr.app.RecordDict]:
    """The same records: Flower's, and quick ones."""

    def made() -> flwr.app.RecordDict:
        arrays = ArrayRecord({str(i): flwr.app.Array(v) for i, v in enumerate(VALUES)})
        metrics, config = MetricRecord({"n": 3}), ConfigRecord({"lr": 0.5})
        return flwr.app.RecordDict({"a": arrays, "m": metrics, "c": config})

    plain, quick = made(), made()
    quicken(quick)
    assert type(quick) is quick_records.RecordDict
    assert all(type(a) is quick_records.Array for a in _arrays(quick).values())
    return plain, quick


def _arrays(records: flwr.app.RecordDict) -> Any:
    return records["a"]


def test_arrays_are_read_as_flower_reads_them() -> None:
    plain, quick = both()
    for _ in range(2):
        for key, array in _arrays(plain).items():
            expected, found = array.numpy(), _arrays(quick)[key].numpy()
            assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
            assert found.flags.writeable
            np.testing.assert_array_equal(found, expected)
            if found.size:
                found.flat[0] = found.flat[-1]  # a copy: the next reader sees what was sent


@pytest.mark.parametrize("damage", [lambda d: d[:-1], lambda d: d[:9], lambda d: b"PK" + d])
def test_what_flower_refuses_is_refused(damage: Any) -> None:
    plain, quick = both()
    for records in (plain, quick):
        array = _arrays(records)["0"]
        array.data = damage(array.data)
        with pytest.raises((ValueError, EOFError, OSError)):
            array.numpy()
        array.stype = "other"
        with pytest.raises(TypeError, match="Unsupported serialization type"):
            array.numpy()
    assert SType.NUMPY == "numpy.ndarray"


def test_they_are_equal_and_serialised_alike() -> None:
    plain, quick = both()
    assert plain == quick
    assert quick == plain
    assert _arrays(plain)["0"] == _arrays(quick)["0"]
    assert _arrays(quick)["0"] == _arrays(plain)["0"]
    assert _arrays(quick)["0"] != _arrays(plain)["1"]
    assert quick.object_id == plain.object_id
    for name in ("array_records", "metric_records", "config_records"):
        assert dict(getattr(quick, name)) == dict(getattr(plain, name))


def test_changes_of_a_kind_reach_the_records() -> None:
    for records in both():
        records.metric_records["m2"] = MetricRecord({"k": 1.0})
        del records.config_records["c"]
        assert set(records) == {"a", "m", "m2"}
        with pytest.raises(TypeError):
            records.array_records["b"] = MetricRecord()  # type: ignore[assignment]


def test_pickles_and_copies_are_flowers_own() -> None:
    plain, quick = both()
    document = pickle.dumps(quick, protocol=5)
    assert b"umbel" not in document
    for again in (pickle.load(io.BytesIO(document)), copy.deepcopy(quick), copy.copy(quick)):
        assert type(again) is flwr.app.RecordDict
        assert again == plain
    assert type(pickle.loads(pickle.dumps(_arrays(quick)["0"]))) is flwr.app.Array
