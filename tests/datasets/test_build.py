"""From [data] to clients: names, holdouts, test parts, determinism, immutability."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from umbel.core.errors import InputError
from umbel.core.run_file import Data
from umbel.datasets.build import label_counts, load, summary
from umbel.datasets.deal import Deal, by_client
from umbel.datasets.federated import FederatedData, Holdings, Numbered, rows
from umbel.datasets.holdout import stratified


def loaded(seed: int = 0, **table: Any) -> FederatedData:
    return load(Data.model_validate(table), seed)


def by_halves(deal: Deal, clients: int = 2) -> Holdings:
    """A split of a user's own."""
    return by_client(np.arange(len(deal)) * clients // len(deal), clients)


def not_a_split(deal: Deal) -> list[int]:
    return [1, 2]


@pytest.fixture
def owned(tmp_path: Path) -> dict[str, Any]:
    """An npz with four owners of 5, 1, 10 and 20 rows, no test part; x tells the row."""
    owner = np.repeat(["d", "b", "c", "a"], [5, 1, 10, 20])
    x, y = np.arange(36.0)[:, None], np.arange(36) % 2
    np.savez(tmp_path / "own.npz", x=x, y=y, client=owner)
    return {"name": "npz", "path": str(tmp_path)}


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=12),
    share=st.floats(0, 0.999),
    classes=st.integers(1, 5),
    seed=st.integers(0, 2**32),
)
def test_stratified(sizes: list[int], share: float, classes: int, seed: int) -> None:
    group = np.repeat(np.arange(len(sizes)), sizes)
    labels = np.random.default_rng(seed).integers(classes, size=len(group))
    aside = stratified(labels, group, share, seed, "test")
    np.testing.assert_array_equal(aside, stratified(labels, group, share, seed, "test"))
    for place, n in enumerate(sizes):
        own = group == place
        taken = int(aside[own].sum())
        assert taken == min(int(np.floor(n * share + 0.5)), n - 1)
        for c in range(classes):
            of_class = own & (labels == c)
            assert abs(aside[of_class].sum() - of_class.sum() * taken / n) < 1 + 1e-9


def test_stratified_draws_every_row_sooner_or_later() -> None:
    labels, group = np.repeat([0, 1], 5), np.zeros(10, int)
    drawn = sum(stratified(labels, group, 0.2, seed, "test").astype(int) for seed in range(400))
    assert np.all(np.abs(np.asarray(drawn) - 80) < 40)  # mean 80, deviation 8


def test_the_global_test_set_is_the_same_for_every_split() -> None:
    kinds = [{"kind": "iid"}, {"kind": "shards", "clients": 30}, {"kind": "quantity", "alpha": 1.0}]
    parts = [loaded(name="digits", holdout=0.25, split=kind) for kind in kinds]
    assert all(p.test is not None and rows(p.test) == 449 for p in parts)
    tests = [p.test["x"] for p in parts if p.test is not None]
    np.testing.assert_array_equal(tests[0], tests[1])
    np.testing.assert_array_equal(tests[0], tests[2])
    other = loaded(1, name="digits", holdout=0.25).test
    assert other is not None
    assert not np.array_equal(tests[0], other["x"])


def test_the_holdout_is_stratified_and_disjoint() -> None:
    data = loaded(name="digits")
    assert data.test is not None
    assert (rows(data.train), rows(data.test)) == (1438, 359)
    whole = np.bincount(data.train["y"]) + np.bincount(data.test["y"])
    assert np.all(np.abs(np.bincount(data.test["y"]) - whole * 0.2) <= 1)
    pictures = {x.tobytes() for x in data.train["x"]} | {x.tobytes() for x in data.test["x"]}
    assert len(pictures) == 1797  # digits has no two equal pictures


def test_defaults_for_sets_without_owners() -> None:
    data = loaded(name="digits")
    assert list(data.names) == [f"c{i}" for i in range(10)]
    assert data.client_test is None
    assert data.test_part(0) is None
    none = loaded(name="digits", holdout=0.0)
    assert none.test is None
    assert rows(none.train) == 1797


@pytest.mark.parametrize("clients", [1, 9, 10, 11, 100, 101, 1000])
def test_names_are_in_lexicographic_order(clients: int) -> None:
    names = loaded(name="digits", split={"kind": "iid", "clients": clients}).names
    assert isinstance(names, Numbered)
    assert list(names) == sorted(names)
    assert len(set(names)) == clients
    assert all(names.index(name) == i for i, name in enumerate(names))


def test_client_holdout_stays_at_the_client() -> None:
    data = loaded(name="digits", client_holdout=0.5, split={"kind": "iid", "clients": 20})
    assert data.test is not None
    assert data.client_test is not None
    assert data.client_test_holdings is not None
    before = loaded(name="digits", split={"kind": "iid", "clients": 20})
    for place in range(20):
        part = data.test_part(place)
        assert part is not None
        both = np.concatenate([data.train_part(place)["x"], part["x"]])
        own = before.train_part(place)["x"]
        assert {x.tobytes() for x in both} == {x.tobytes() for x in own}
        assert abs(len(part["x"]) - len(both) / 2) <= 0.5
    assert rows(data.train) == data.train_holdings.sizes().sum()
    assert rows(data.client_test) == data.client_test_holdings.sizes().sum()


def test_one_training_example_stays() -> None:
    split = {"kind": "iid", "clients": 1000}
    data = loaded(name="digits", client_holdout=0.9, split=split)
    assert data.train_holdings.sizes().min() == 1


def test_shares_too_small_for_an_example() -> None:
    with pytest.raises(InputError, match="holdout = 1e-06 of 1797"):
        loaded(name="digits", holdout=1e-6)
    data = loaded(name="digits", client_holdout=0.2, split={"kind": "iid", "clients": 1438})
    assert data.client_test is None
    assert data.client_test_holdings is None


def test_natural_clients_keep_a_fifth(owned: dict[str, Any]) -> None:
    data = loaded(**owned)
    assert list(data.names) == ["a", "b", "c", "d"]
    assert data.test is None
    assert data.client_test_holdings is not None
    assert data.train_holdings.sizes().tolist() == [16, 1, 8, 4]
    assert data.client_test_holdings.sizes().tolist() == [4, 0, 2, 1]
    assert data.test_part(1) is None
    seen = np.concatenate([data.train_part(0)["x"], np.asarray(data.test_part(0)["x"])])  # type: ignore[index]
    np.testing.assert_array_equal(np.sort(seen[:, 0]), np.arange(16.0, 36.0))


def test_explicit_shares_of_natural_clients(owned: dict[str, Any]) -> None:
    both = loaded(**owned, holdout=0.25, client_holdout=0.5)
    assert both.test is not None
    assert both.client_test is not None
    assert rows(both.test) == 9
    given = loaded(**owned, client_holdout=0.2)
    np.testing.assert_array_equal(given.train["x"], loaded(**owned).train["x"])
    shared = loaded(**owned, client_holdout=0.0)
    assert shared.test is not None
    assert shared.client_test is None
    nothing = loaded(**owned, holdout=0.0, client_holdout=0.0)
    assert nothing.test is None
    assert nothing.client_test is None
    assert rows(nothing.train) == 36


def test_small_owners_can_be_left_out(owned: dict[str, Any]) -> None:
    data = loaded(**owned, split={"kind": "natural", "minimum": 5}, client_holdout=0.2)
    assert list(data.names) == ["a", "c", "d"]
    assert data.train_holdings.sizes().tolist() == [16, 8, 4]


def test_test_parts_of_owners(tmp_path: Path) -> None:
    x, y = np.arange(8.0)[:, None], np.arange(8) % 2
    client, client_test = np.array(list("bbbaaacc")), np.array(list("cab"))
    arrays = {"x": x, "y": y, "client": client, "x_test": x[:3] + 100, "y_test": y[:3]}
    np.savez(tmp_path / "own.npz", **arrays, client_test=client_test)
    table = {"name": "npz", "path": str(tmp_path)}
    data = loaded(**table)
    assert data.test is None
    assert [data.test_part(i)["x"].tolist() for i in range(3)] == [[[101]], [[102]], [[100]]]  # type: ignore[index]
    pooled = loaded(**table, split={"kind": "iid", "clients": 2})
    assert pooled.test is not None
    assert rows(pooled.test) == 3
    some = loaded(**table, split={"kind": "natural", "minimum": 3})
    assert some.client_test is not None
    assert rows(some.client_test) == 2
    replaced = loaded(**table, client_holdout=0.34)
    assert replaced.test is not None
    assert rows(replaced.test) == 3
    assert replaced.client_test is not None
    assert rows(replaced.client_test) == 3
    np.savez(tmp_path / "own.npz", **arrays, client_test=np.array(list("cax")))
    with pytest.raises(InputError, match="'x' owns test examples and no training examples"):
        loaded(**table)


def test_a_sites_files_are_its_own_whatever_the_split(tmp_path: Path) -> None:
    x, y = np.arange(20.0)[:, None], np.arange(20) % 2
    section = Data.model_validate(
        {"name": "npz", "path": str(tmp_path), "split": {"kind": "iid", "clients": 1000}}
    )
    np.savez(tmp_path / "own.npz", x=x, y=y)
    data = load(section, 0, "basel")
    assert list(data.names) == ["basel"]
    kept = data.test_part(0)
    assert kept is not None
    assert (rows(data.train_part(0)), rows(kept)) == (16, 4)
    np.savez(tmp_path / "own.npz", x=x, y=y, x_test=x[:3], y_test=y[:3])
    data = load(section, 0, "basel")
    kept = data.test_part(0)
    assert data.test is None
    assert kept is not None
    assert (rows(data.train_part(0)), rows(kept)) == (20, 3)
    np.savez(tmp_path / "own.npz", x=x, y=y, client=np.repeat(["basel", "cork"], 10))
    assert list(load(section, 0, "basel").names) == ["basel", "cork"]


@pytest.mark.data
def test_hospitals_keep_their_own_test_parts(data_root: Path) -> None:
    data = loaded(name="heart-disease", path=str(data_root))
    assert list(data.names) == ["cleveland", "hungarian", "switzerland", "va"]
    assert data.test is None
    assert data.client_test_holdings is not None
    assert data.train_holdings.sizes().tolist() == [199, 172, 30, 85]
    assert data.client_test_holdings.sizes().tolist() == [104, 89, 16, 45]
    other = loaded(7, name="heart-disease", path=str(data_root))
    np.testing.assert_array_equal(data.train["x"], other.train["x"])  # the benchmark's, not ours


def test_seed_and_section_decide() -> None:
    table = {"name": "digits", "client_holdout": 0.2, "split": {"kind": "dirichlet", "alpha": 0.3}}
    a, b, c = loaded(3, **table), loaded(3, **table), loaded(4, **table)
    np.testing.assert_array_equal(a.train_holdings.index, b.train_holdings.index)
    np.testing.assert_array_equal(a.train["x"], b.train["x"])
    assert not np.array_equal(a.train["x"], c.train["x"])


def test_data_are_read_only() -> None:
    data = loaded(name="digits", client_holdout=0.2)
    assert data.client_test_holdings is not None
    for arrays in (data.train, data.test, data.client_test):
        assert arrays is not None
        for column in arrays.values():
            with pytest.raises(ValueError, match="read-only"):
                column[0] = 0
    for held in (data.train_holdings, data.client_test_holdings):
        with pytest.raises(ValueError, match="read-only"):
            held.index[0] = 0
    data.train_part(0)["x"][0] = 0  # a copy is the caller's own


def test_a_client_without_examples_is_named() -> None:
    split = {"kind": "dirichlet", "clients": 200, "alpha": 0.01, "minimum": 0}
    with pytest.raises(InputError, match=r"client 'c\d{3}' has no training examples"):
        loaded(name="digits", split=split)


@pytest.mark.parametrize(
    ("split", "fault"),
    [
        ({"kind": "dirichle"}, "unknown split 'dirichle'"),
        ({"kind": "iid", "alpha": 0.5}, "unknown key 'alpha' of split 'iid'"),
        ({"kind": "iid", "clients": 0}, "clients = 0"),
        ({"kind": "dirichlet", "alpha": -1}, "alpha = -1"),
        ({"kind": "natural"}, "names the owner"),
        ({"kind": "iid", "clients": 2000}, "there are 1438 training examples"),
    ],
)
def test_impossible_splits(split: dict[str, Any], fault: str) -> None:
    with pytest.raises(InputError) as caught:
        loaded(name="digits", split=split)
    assert fault in caught.value.message
    assert caught.value.where == "[data.split]"
    assert caught.value.fix


def test_a_users_own_split(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "my_splits", sys.modules[__name__])
    data = loaded(name="digits", split={"kind": "my_splits:by_halves", "clients": 4})
    assert len(data.names) == 4
    assert data.train_holdings.of_client(0)[0] == 0
    with pytest.raises(InputError, match="gave list, expected Holdings"):
        loaded(name="digits", split={"kind": "my_splits:not_a_split"})


def test_targets_are_dealt_by_decile() -> None:
    data = loaded(name="diabetes", split={"kind": "shards", "clients": 5})
    counts = label_counts(data)
    assert counts.shape == (5, 10)
    assert np.all((counts > 0).sum(1) <= 5)
    assert np.ptp(counts.sum(0)) <= 10


def test_summary_counts() -> None:
    data = loaded(name="digits", split={"kind": "quantity", "clients": 12}, client_holdout=0.1)
    counts = label_counts(data)
    facts = summary(data)
    np.testing.assert_array_equal(counts.sum(0), np.bincount(data.train["y"]))
    np.testing.assert_array_equal(counts.sum(1), data.train_holdings.sizes())
    part = np.bincount(data.train_part(3)["y"], minlength=10)
    np.testing.assert_array_equal(counts[3], part)
    assert facts["clients"] == 12
    assert facts["examples"] == counts.sum() == rows(data.train)
    assert facts["examples"] + facts["test_examples"] + facts["client_test_examples"] == 1797
    assert facts["examples_per_client"]["max"] == counts.sum(1).max()
