"""npz and csv: what they read, and how they name what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from umbel.core.errors import InputError
from umbel.core.run_file import Data
from umbel.datasets.build import load, read
from umbel.datasets.federated import Dataset

X = np.arange(12, dtype=np.float64).reshape(6, 2)
Y = np.array([0, 1, 0, 1, 2, 2])


def own(name: str, path: Path, **keys: Any) -> Dataset:
    return read(Data.model_validate({"name": name, "path": str(path), **keys}))


def saved(folder: Path, **arrays: Any) -> Path:
    np.savez(folder / "own.npz", **arrays)
    return folder / "own.npz"


def table(folder: Path, text: str) -> Path:
    (folder / "own.csv").write_text(text, encoding="utf-8")
    return folder / "own.csv"


def test_npz_with_clients_and_a_test_part(tmp_path: Path) -> None:
    client = np.array([2, 10, 2, 10, 2, 2])
    file = saved(
        tmp_path, x=X, y=Y, client=client, x_test=X[:2], y_test=Y[:2], client_test=client[:2]
    )
    data = own("npz", file)
    assert data.info.classes == 3
    assert data.train["x"].dtype == np.float32
    dealt = load(Data(name="npz", path=str(tmp_path)), 0)
    assert list(dealt.names) == ["10", "2"]  # names are text
    assert dealt.train_holdings.sizes().tolist() == [2, 4]
    part = dealt.test_part(1)
    assert part is not None
    assert part["x"].tolist() == [[0, 1]]


def test_npz_targets_and_symbols(tmp_path: Path) -> None:
    regression = own("npz", saved(tmp_path, x=X, y=np.stack([X[:, 0], X[:, 1]], 1)))
    assert regression.info.classes is None
    assert regression.info.targets == 2
    symbols = own("npz", saved(tmp_path, x=X.astype(int), y=Y), vocabulary=12, classes=5)
    assert symbols.train["x"].dtype == np.int64
    assert symbols.info.classes == 5


@pytest.mark.parametrize(
    ("arrays", "fault"),
    [
        ({"x": X}, "array 'y' is missing"),
        ({"x": X, "y": Y, "z": Y}, "unknown array 'z'"),
        ({"x": X, "y": Y[:5]}, "'y' has shape (5,)"),
        ({"x": X, "y": Y - 1}, "labels -1 … 1"),
        ({"x": np.where(X == 5, np.nan, X), "y": Y}, "'x' is NaN or infinite in row 2"),
        ({"x": X.astype(str), "y": Y}, "'x' holds <U"),
        ({"x": X, "y": np.array([None] * 6)}, "pickle"),
        ({"x": X, "y": Y, "x_test": X}, "array 'y_test' is missing"),
        ({"x": X, "y": Y, "x_test": X[:, :1], "y_test": Y}, "x_test has examples of shape (1,)"),
        ({"x": X, "y": Y, "client": Y[:2]}, "'client' has shape (2,)"),
        ({"x": X[:0], "y": Y[:0]}, "'x' has shape (0, 2), x has (0,) rows"),
        ({"x": X[:, 0], "y": Y}, "'x' has one dimension"),
        ({"x": X, "y": Y[:, None]}, "'y' has shape (6, 1)"),
    ],
)
def test_npz_damaged(tmp_path: Path, arrays: dict[str, Any], fault: str) -> None:
    file = saved(tmp_path, **arrays)
    with pytest.raises(InputError) as caught:
        own("npz", file)
    assert fault.lower() in caught.value.message.lower()
    assert caught.value.where == str(file)
    assert caught.value.fix.startswith("expected an .npz")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.9])
def test_npz_cut(tmp_path: Path, share: float) -> None:
    file = saved(tmp_path, x=np.zeros((100, 10)), y=np.zeros(100, int))
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(InputError, match="cut short"):
        own("npz", file)


def test_own_files_need_a_path(tmp_path: Path) -> None:
    for name in ("npz", "csv"):
        with pytest.raises(InputError, match="'path' is missing"):
            read(Data(name=name))
        with pytest.raises(InputError, match="no such file"):
            own(name, tmp_path / f"none.{name}")
        with pytest.raises(InputError, match="0 files with the suffix"):
            own(name, tmp_path)


def test_csv_kinds_of_target(tmp_path: Path) -> None:
    text = "age,dose,site,ill\n40,1.5,b,yes\n50,2.5,a,no\n60,3.5,b,no\n"
    data = own("csv", table(tmp_path, text), client="site")
    assert data.train["x"].tolist() == [[40, 1.5], [50, 2.5], [60, 3.5]]
    assert data.train["y"].tolist() == [1, 0, 0]
    assert data.owner is not None
    assert data.owner.tolist() == ["b", "a", "b"]
    ordered = own("csv", tmp_path, client="site", labels=["yes", "no", "unknown"])
    assert ordered.train["y"].tolist() == [0, 1, 1]
    assert ordered.info.classes == 3
    real = own("csv", table(tmp_path, "a,b\n1,0.5\n2,1\n"), regression=True, target="b")
    assert real.info.classes is None
    assert real.train["y"].tolist() == [0.5, 1]
    whole = own("csv", table(tmp_path, "y,a\n0,1\n1.0,2\n1,4\n"), target="y", standardise=True)
    assert whole.train["y"].tolist() == [0, 1, 1]
    assert whole.train["x"].mean() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("text", "keys", "fault"),
    [
        ("a,y\n1,0\n2\n", {}, "line 3 has 1 fields, the header has 2"),
        ("a,y\n1,0\nhigh,1\n", {}, "line 3, column 'a': 'high' is not a finite number"),
        ("a,y\n1,0\n,1\n", {}, "line 3, column 'a': ''"),
        ("a,y\n1,0\nnan,1\n", {}, "line 3, column 'a': 'nan'"),
        ("a,y\n1,0.5\n2,0.25\n", {}, "regression = true?"),
        ("a,y\n1,5000\n2,1\n", {}, "regression = true?"),
        ("a,y\n1,-1\n2,1\n", {}, "regression = true?"),
        ("a,y\n1,no\n2,\n", {}, "line 3, column 'y': ''"),
        ("a,y\n1,no\n2,yes\n", {"labels": ["no"]}, "'yes' is not one of no"),
        ("a,y\n1,no\n2,yes\n", {"regression": True}, "line 2, column 'y': 'no'"),
        ("a,y\n", {}, "no rows"),
        ("", {}, "no rows"),
        ("a,a,y\n1,1,1\n", {}, "column 'a' is there twice"),
        ("y\n1\n", {}, "no feature column"),
        ('a,y\n"1,0\n2,1\n', {}, "line "),
        ("a,y\n1,0\n", {"target": "z"}, "no column 'z'"),
        ("a,y\n1,0\n", {"client": "hospital"}, "no column 'hospital'"),
        ("a,s,y\n1,u,0\n1,,0\n", {"client": "s"}, "line 3, column 's': empty"),
    ],
)
def test_csv_damaged(tmp_path: Path, text: str, keys: dict[str, Any], fault: str) -> None:
    file = table(tmp_path, text)
    with pytest.raises(InputError) as caught:
        own("csv", file, **keys)
    assert fault in caught.value.message
    assert caught.value.where == str(file)
    assert caught.value.fix
