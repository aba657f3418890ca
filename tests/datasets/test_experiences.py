"""Experiences: every example is in one, and buffers keep what they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from umbel.core.errors import InputError
from umbel.core.run_file import Continual, Data, Split
from umbel.datasets.buffer import Buffer, herded, replayed
from umbel.datasets.build import load, read
from umbel.datasets.experiences import of_stage, stream
from umbel.datasets.federated import FederatedData


@pytest.fixture(scope="module")
def digits() -> FederatedData:
    return load(Data(name="digits", split=Split(kind="iid", clients=3)), 0)


def test_every_row_is_met_once_and_by_its_owner(digits: FederatedData) -> None:
    for by in ("class", "permutation", "rotation"):
        for order in ("in-step", "shuffled"):
            found = stream(digits, Continual(experiences=4, by=by, order=order), 1)
            for place in range(3):
                met = np.concatenate([found.met(place, stage) for stage in range(4)])
                assert sorted(met) == sorted(digits.train_holdings.of_client(place))


def test_classes_go_to_experiences_in_order(digits: FederatedData) -> None:
    found = stream(digits, Continual(experiences=5), 0)
    assert found.times.of_class is not None
    assert found.times.of_class.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert found.times.seen(1).tolist() == [True] * 4 + [False] * 6
    assert set(digits.train["y"][found.met(0, 2)].tolist()) == {4, 5}
    assert found.data.test is not None
    assert (found.data.test["experience"] == found.data.test["y"] // 2).all()


def test_a_permutation_moves_inputs_and_the_first_domain_stays(digits: FederatedData) -> None:
    found = stream(digits, Continual(experiences=3, by="permutation"), 0)
    before = digits.train["x"].reshape(len(found.of_row), -1)
    after = found.data.train["x"].reshape(len(found.of_row), -1)
    first = found.of_row == 0
    np.testing.assert_array_equal(after[first], before[first])
    np.testing.assert_array_equal(np.sort(after, 1), np.sort(before, 1))
    assert (after[~first] != before[~first]).any(1).mean() > 0.99
    # One permutation for all rows of a domain.
    second = np.flatnonzero(found.of_row == 1)
    columns = [tuple(column) for column in before[second].T]
    assert {tuple(column) for column in after[second].T} == set(columns)


def test_a_picture_is_rotated_about_its_centre() -> None:
    x = np.zeros((8, 1, 4, 4), np.float32)
    x[:, 0, 0, 0] = 1.0
    data = load(Data(name="digits", split=Split(kind="iid", clients=1)), 0)
    info = data.info.__class__("corner", (1, 4, 4), classes=10)
    few = FederatedData(
        info,
        ["c0"],
        {"x": x, "y": np.arange(8)},
        data.train_holdings.of(parts=[np.arange(8)]),
        None,
        None,
        None,
    )
    found = stream(few, Continual(experiences=2, by="rotation"), 0)
    turned = found.data.train["x"][found.of_row == 1]
    corners = {(0, 3), (3, 0)}
    for picture in turned:  # a quarter
        place = np.unravel_index(picture[0].argmax(), (4, 4))
        assert (int(place[0]), int(place[1])) in corners
        assert picture[0].max() == pytest.approx(1.0, abs=1e-5)


def test_more_experiences_than_classes_are_refused(digits: FederatedData) -> None:
    with pytest.raises(InputError, match="10 classes"):
        stream(digits, Continual(experiences=11), 0)


def test_clients_without_a_row_are_left_out(digits: FederatedData) -> None:
    found = stream(digits, Continual(experiences=5), 0)
    parts = [found.met(0, 0), found.met(1, 0)[:0], found.met(2, 0)]
    stage = of_stage(found, parts)
    assert list(stage.names) == [digits.names[0], digits.names[2]]
    assert stage.train_holdings.sizes().tolist() == [len(parts[0]), len(parts[2])]


LABELS = np.repeat(np.arange(4), 50)
MET = [np.arange(0, 100, dtype=np.int32), np.arange(100, 200, dtype=np.int32)]


def test_a_balanced_buffer_has_as_many_of_each_class() -> None:
    kept = Buffer.bounded(7, None, None, "balanced", True).kept(MET, LABELS, 8, 0, "c0")
    assert np.bincount(LABELS[kept]).tolist() == [7, 7, 7, 7]
    kept = Buffer.bounded(None, 10, None, "balanced", True).kept(MET, LABELS, 8, 0, "c0")
    assert sorted(np.bincount(LABELS[kept]).tolist()) == [2, 2, 3, 3]


@pytest.mark.parametrize("choice", ["balanced", "reservoir"])
def test_a_byte_budget_binds(choice: str) -> None:
    buffer = Buffer.bounded(None, None, 8 * 13 + 7, choice, True)  # type: ignore[arg-type]
    assert len(buffer.kept(MET, LABELS, 8, 0, "c0")) == 13
    assert len(set(buffer.kept(MET, LABELS, 8, 0, "c0").tolist())) == 13


@pytest.mark.parametrize("choice", ["balanced", "reservoir"])
def test_what_was_dropped_never_comes_back(choice: str) -> None:
    buffer = Buffer.bounded(None, 20, None, choice, True)  # type: ignore[arg-type]
    early = buffer.kept(MET[:1], LABELS, 8, 0, "c0")
    late = buffer.kept(MET, LABELS, 8, 0, "c0")
    assert set(late[late < 100].tolist()) <= set(early.tolist())


def test_a_reservoir_is_uniform() -> None:
    buffer = Buffer.bounded(None, 20, None, "reservoir", True)
    found = [buffer.kept(MET, LABELS, 8, seed, "c0") for seed in range(400)]
    counts = np.bincount(np.concatenate(found), minlength=200)
    # 400 draws at 1/10 each: 40 ± 6 standard deviations of 6.
    assert counts.min() > 4
    assert counts.max() < 76


def test_an_unlimited_buffer_has_everything_and_none_has_nothing() -> None:
    whole = Buffer.bounded(None, 10**9, None, "balanced", False)
    assert sorted(whole.kept(MET, LABELS, 8, 0, "c0")) == list(range(200))
    none = Buffer.bounded(None, 0, None, "balanced", False)
    assert len(none.kept(MET, LABELS, 8, 0, "c0")) == 0


def test_old_rows_are_repeated_until_as_many_as_new_ones() -> None:
    new, old = np.arange(10, dtype=np.int32), np.array([90, 91, 92], np.int32)
    assert np.bincount(replayed(new, old, repeat=True))[90:].tolist() == [4, 3, 3]
    assert replayed(new, old, repeat=False).tolist() == [*range(10), 90, 91, 92]


def test_a_reservoir_needs_a_bound_of_its_own() -> None:
    with pytest.raises(InputError, match="bounded as a whole"):
        Buffer.bounded(None, None, None, "reservoir", True)


def test_columns_of_an_own_file(tmp_path: Path) -> None:
    x, y, year = np.zeros((6, 2)), np.array([0, 1, 0, 1, 0, 1]), np.arange(6) + 2018
    test = {"x_test": x[:2], "y_test": y[:2]}
    file = str(tmp_path / "own.npz")

    def found(**arrays: Any) -> Any:
        np.savez(file, x=x, y=y, **arrays)
        return read(Data.model_validate({"name": "npz", "path": file, "columns": ["year"]}))

    both = found(year=year, year_test=year[:2], **test)
    assert both.train["year"].tolist() == year.tolist()
    assert both.test["year"].tolist() == [2018, 2019]
    for arrays, message in [
        ({}, "'year' is missing"),
        ({"year": year / 2}, "expected .* whole numbers"),
        ({"year": year[:3]}, "expected .* whole numbers"),
        ({"year": year, **test}, "'year_test' is missing"),
        ({"year": year, "month": year}, "unknown array 'month'"),
    ]:
        with pytest.raises(InputError, match=message):
            found(**arrays)


def test_herding_brings_the_mean_near_first() -> None:
    features = np.array([[4.0, 0.0], [0.0, 1.0], [-3.0, -1.0], [0.2, 0.1]])
    order = herded(features, None)
    assert order[0] == 3  # the nearest to the mean, (0.3, 0.025)
    taken = features[order]
    # Each is the best that could follow those before it.
    for k in range(1, 4):
        options = [(taken[:k].sum(0) + f) / (k + 1) for f in taken[k:]]
        far = [np.square(features.mean(0) - o).sum() for o in options]
        assert int(np.argmin(far)) == 0
    assert herded(features, 1).tolist() == [3, 0, 1, 2]
    ranks = np.argsort(np.tile(np.arange(50), 4))
    kept = Buffer.bounded(2, None, None, "herding", True).kept(MET, LABELS, 8, 0, "c0", ranks)
    assert np.bincount(LABELS[kept]).tolist() == [2, 2, 2, 2]
