"""Each reader on real data: shapes, ranges, owners, and what its docstring promises."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from umbel.core import registry
from umbel.core.errors import InputError
from umbel.core.run_file import Data
from umbel.datasets.build import read
from umbel.datasets.federated import Dataset, rows


def check(data: Dataset) -> None:
    """What every reader guarantees."""
    for part, owner in ((data.train, data.owner), (data.test, data.test_owner)):
        if part is None:
            continue
        x, y = part["x"], part["y"]
        assert len(x) == len(y) > 0
        assert x.shape[1:] == data.info.input_shape
        assert x.dtype == (np.float32 if data.info.vocabulary is None else np.int64)
        assert np.isfinite(x).all()
        if data.info.classes is None:
            assert y.dtype == np.float32
        else:
            assert y.dtype == np.int64
            assert y.min() >= 0
            assert y.max() < data.info.classes
        if owner is not None:
            assert owner.shape == y.shape
            assert owner.dtype.kind == "U"
            assert all(np.unique(owner))


def test_bundled_sets() -> None:
    digits = read(Data(name="digits"))
    cancer = read(Data(name="breast-cancer"))
    diabetes = read(Data(name="diabetes"))
    for data in (digits, cancer, diabetes):
        check(data)
    assert digits.train["x"].shape == (1797, 1, 8, 8)
    assert (digits.train["x"].min(), digits.train["x"].max()) == (0, 1)
    assert cancer.train["x"].shape == (569, 30)
    np.testing.assert_allclose(cancer.train["x"].mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(cancer.train["x"].std(0), 1, atol=1e-5)
    assert diabetes.info.classes is None
    np.testing.assert_allclose(diabetes.train["y"].std(), 1, atol=1e-5)


@pytest.mark.data
def test_mnist(data_root: Path) -> None:
    data = read(Data(name="mnist", path=str(data_root)))
    check(data)
    assert data.test is not None
    assert data.train["x"].shape == (60000, 1, 28, 28)
    assert data.test["x"].shape == (10000, 1, 28, 28)
    assert data.train["y"][:5].tolist() == [5, 0, 4, 1, 9]
    # The mean and deviation that the literature normalises MNIST by.
    assert data.train["x"].mean(dtype=np.float64) == pytest.approx(0.1307, abs=1e-4)
    assert data.train["x"].std(dtype=np.float64) == pytest.approx(0.3081, abs=1e-4)


@pytest.mark.data
def test_heart_disease_is_flambys(data_root: Path) -> None:
    data = read(Data(name="heart-disease", path=str(data_root)))
    check(data)
    assert data.test is not None
    assert data.owner is not None
    assert data.test_owner is not None
    sizes = {
        h: (int((data.owner == h).sum()), int((data.test_owner == h).sum()))
        for h in np.unique(data.owner)
    }
    assert sizes == {
        "cleveland": (199, 104),
        "hungarian": (172, 89),
        "switzerland": (30, 16),
        "va": (85, 45),
    }
    assert data.info.input_shape == (13,)
    assert data.info.classes == 2
    for hospital in sizes:
        own = data.train["x"][data.owner == hospital].astype(np.float64)
        constant = own.min(0) == own.max(0)
        np.testing.assert_allclose(own.mean(0), 0, atol=1e-5)
        np.testing.assert_allclose(own.std(0, ddof=1)[~constant], 1, atol=1e-5)
        assert (own[:, constant] == 0).all()
        theirs = data.test["x"][data.test_owner == hospital]
        assert np.abs(theirs.mean(0)).max() > 1e-3  # not standardised by itself


@pytest.mark.data
def test_heart_disease_follows_the_recipe_in_pandas(data_root: Path) -> None:
    """Written again as the benchmark writes it, with data frames and torch's deviation."""
    pd = pytest.importorskip("pandas")
    from sklearn.model_selection import train_test_split

    data = read(Data(name="heart-disease", path=str(data_root)))
    frames, centers, in_test = [], [], []
    for center in ("cleveland", "hungarian", "switzerland", "va"):
        path = data_root / "heart_disease" / f"processed.{center}.data"
        frame = pd.read_csv(path, header=None, na_values="?").drop([10, 11, 12], axis=1).dropna()
        label = (frame.iloc[:, -1] > 0).astype(int)
        enough = label.nunique() > 1 and label.value_counts().min() > 2
        _, test = train_test_split(
            np.arange(len(frame)),
            test_size=1.0 - 0.66,
            train_size=0.66,
            random_state=43,
            shuffle=True,
            stratify=label if enough else None,
        )
        frames.append(frame)
        centers += [center] * len(frame)
        in_test += [i in set(test.tolist()) for i in range(len(frame))]
    pooled = pd.concat(frames, ignore_index=True)
    x = pd.get_dummies(pooled.iloc[:, :-1], columns=[2, 6], drop_first=True).to_numpy(np.float32)
    held, center = np.array(in_test), np.array(centers)
    expected = np.empty_like(x)
    for name in np.unique(center):
        base = x[(center == name) & ~held].astype(np.float64)
        std = base.std(0, ddof=1)
        expected[center == name] = (x[center == name] - base.mean(0)) / np.where(std > 0, std, 1)
    assert data.test is not None
    np.testing.assert_allclose(data.train["x"], expected[~held], atol=1e-5)
    np.testing.assert_allclose(data.test["x"], expected[held], atol=1e-5)
    labels = (pooled.iloc[:, -1] > 0).to_numpy(np.int64)
    np.testing.assert_array_equal(data.test["y"], labels[held])


@pytest.mark.data
def test_wisdm(data_root: Path) -> None:
    data = read(Data(name="wisdm", path=str(data_root)))
    check(data)
    assert data.owner is not None
    assert data.train["x"].shape == (5418, 43)
    assert len(np.unique(data.owner)) == 36
    # Downstairs … Walking, counted with grep in the file.
    assert np.bincount(data.train["y"]).tolist() == [528, 1625, 306, 246, 632, 2081]
    deviation = data.train["x"].std(0, dtype=np.float64)
    assert np.all((np.abs(deviation - 1) < 1e-4) | (deviation == 0))


@pytest.mark.data
def test_tinyshakespeare(data_root: Path) -> None:
    data = read(Data(name="tinyshakespeare", path=str(data_root)))
    check(data)
    assert data.test is not None
    assert data.owner is not None
    assert data.test_owner is not None
    assert data.info.vocabulary == data.info.classes == 65
    speakers = np.unique(data.owner)
    assert len(speakers) == 99
    assert set(data.test_owner) == set(speakers)
    play = (data_root / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8")
    alphabet = np.array(sorted(set(play)))
    window = data.train["x"][data.owner == "MENENIUS"][0]
    spoken = "".join(alphabet[window])
    assert spoken.startswith(
        "What work's, my countrymen, in hand? where go you\nWith bats and clubs?"
    )
    after = play[play.index(spoken[:70]) + 80]
    assert alphabet[data.train["y"][data.owner == "MENENIUS"][0]] == after


@pytest.mark.data
def test_tinyshakespeare_tests_on_later_text(data_root: Path) -> None:
    path = str(data_root)
    data = read(Data.model_validate({"name": "tinyshakespeare", "path": path, "stride": 80}))
    assert data.test is not None
    assert data.owner is not None
    assert data.test_owner is not None
    seen = {w.tobytes() for w in data.train["x"]}
    assert not any(w.tobytes() in seen for w in data.test["x"])
    train, test = (np.unique(o, return_counts=True)[1] for o in (data.owner, data.test_owner))
    share = np.mean(train / (train + test))
    assert share == pytest.approx(0.8, abs=0.03)


@pytest.mark.data
@pytest.mark.slow
def test_omniglot(data_root: Path) -> None:
    table = {"name": "omniglot", "path": str(data_root), "size": 14, "owner": "alphabet"}
    data = read(Data.model_validate(table))
    check(data)
    assert data.test is not None
    assert data.owner is not None
    assert (rows(data.train), rows(data.test)) == (19280, 13180)
    assert data.info.input_shape == (1, 14, 14)
    assert set(data.train["y"]) == set(range(964))
    assert set(data.test["y"]) == set(range(964, 1623))
    assert len(np.unique(data.owner)) == 30
    assert 0 < data.train["x"].mean() < 0.5  # ink is the smaller part


@pytest.mark.data
@pytest.mark.slow
def test_cifar10(data_root: Path) -> None:
    data = read(Data(name="cifar10", path=str(data_root)))
    check(data)
    assert data.test is not None
    assert np.bincount(data.train["y"]).tolist() == [5000] * 10
    assert np.bincount(data.test["y"]).tolist() == [1000] * 10
    # The channel means that the literature normalises CIFAR-10 by; JPEG moves them a little.
    means = data.train["x"].mean(axis=(0, 2, 3), dtype=np.float64)
    np.testing.assert_allclose(means, [0.4914, 0.4822, 0.4465], atol=2e-3)


@pytest.mark.data
@pytest.mark.parametrize("path", ["", "heart_disease", "heart_disease/processed.va.data"])
def test_path_is_the_root_the_folder_or_a_file(data_root: Path, path: str) -> None:
    assert rows(read(Data(name="heart-disease", path=str(data_root / path))).train) == 486


@pytest.mark.data
def test_root_from_the_environment(data_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UMBEL_DATA", str(data_root))
    assert rows(read(Data(name="heart-disease")).train) == 486


@pytest.mark.parametrize(
    "name", ["mnist", "heart-disease", "omniglot", "tinyshakespeare", "wisdm", "cifar10"]
)
def test_no_path_is_one_error_and_never_a_download(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("UMBEL_DATA", raising=False)
    with pytest.raises(InputError, match="UMBEL_DATA"):
        read(Data(name=name))
    with pytest.raises(InputError, match="no such file") as empty:
        read(Data(name=name, path=str(tmp_path)))
    assert str(tmp_path) in empty.value.where
    assert "expected" in empty.value.fix
    with pytest.raises(InputError, match="no such folder"):
        read(Data(name=name, path=str(tmp_path / "nowhere")))


def test_another_sets_key_is_refused() -> None:
    with pytest.raises(InputError, match="unknown key 'owner' of data set 'digits'"):
        read(Data.model_validate({"name": "digits", "owner": "drawer"}))
    with pytest.raises(InputError, match="unknown data set 'dgits'") as unknown:
        read(Data(name="dgits"))
    assert "'digits'" in unknown.value.fix


def test_every_reader_and_split_is_listed_with_a_line() -> None:
    assert set(registry.known("datasets")) == {
        "breast-cancer", "cartpole-demonstrations", "cartpoles", "cifar10", "csv", "diabetes",
        "digits", "grids", "heart-disease", "mnist", "npz", "omniglot", "preferences", "prompts",
        "sentences", "synthetic-preferences", "synthetic-prompts", "text", "tinyshakespeare",
        "wisdm",
    }  # fmt: skip
    assert set(registry.known("splits")) == {
        "dirichlet", "feature-shift", "gamma-similarity", "iid", "natural", "quantity", "shards",
    }  # fmt: skip
    assert all(registry.known("datasets").values())
    assert all(registry.known("splits").values())


def test_a_reader_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from umbel.datasets import build, plots\n"
        "from umbel.datasets.readers import cifar10, digits, heart_disease, omniglot\n"
        "heavy = ('torch', 'sklearn', 'PIL', 'matplotlib', 'pandas')\n"
        "print([m for m in heavy if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
