"""A file that is cut, garbled or of the wrong kind is one error with path, fault and format."""

from __future__ import annotations

import gzip
import io
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest

from umbel.core.errors import InputError
from umbel.core.run_file import Data
from umbel.datasets.build import read


def refused(name: str, path: Path, file: Path, *expected: str) -> None:
    with pytest.raises(InputError) as caught:
        read(Data(name=name, path=str(path)))
    assert caught.value.where == str(file)
    assert caught.value.fix.startswith("expected ")
    for word in expected:
        assert word in caught.value.message


def copied(root: Path, folder: str, to: Path) -> Path:
    """A copy of a folder of real data that may be written to."""
    shutil.copytree(root / folder, to / folder, copy_function=shutil.copyfile)
    return to / folder


def halve(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def idx(shape: tuple[int, ...], values: bytes) -> bytes:
    sizes = b"".join(n.to_bytes(4, "big") for n in shape)
    # No time of making: a content that differs from process to process has no place in a test.
    return gzip.compress(bytes([0, 0, 8, len(shape)]) + sizes + values, mtime=0)


def small_mnist(folder: Path) -> None:
    for part in ("train", "t10k"):
        images, labels = idx((3, 28, 28), bytes(3 * 784)), idx((3,), bytes([1, 2, 9]))
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(images)
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(labels)


def test_small_mnist_is_read(tmp_path: Path) -> None:
    small_mnist(tmp_path)
    assert read(Data(name="mnist", path=str(tmp_path))).train["y"].tolist() == [1, 2, 9]


@pytest.mark.parametrize(
    ("file", "content", "fault"),
    [
        ("train-images-idx3-ubyte.gz", idx((4, 28, 28), bytes(3 * 784)), "3136 bytes; there are"),
        ("train-images-idx3-ubyte.gz", idx((3,), bytes(3)), "not an IDX file"),
        ("train-images-idx3-ubyte.gz", b"plain text", "cut short"),
        ("t10k-images-idx3-ubyte.gz", idx((3, 28, 27), bytes(3 * 756)), "(28, 27)"),
        ("t10k-labels-idx1-ubyte.gz", idx((2,), bytes(2)), "2 labels for 3 images"),
        ("t10k-labels-idx1-ubyte.gz", idx((3,), bytes([1, 2, 10])), "labels up to 10"),
    ],
    ids=["long", "labels as images", "not gzip", "narrow", "two labels", "label 10"],
)
def test_mnist_damaged(tmp_path: Path, file: str, content: bytes, fault: str) -> None:
    small_mnist(tmp_path)
    (tmp_path / file).write_bytes(content)
    named = tmp_path / file.replace("images-idx3", "labels-idx1") if "up to" in fault else None
    with pytest.raises(InputError) as caught:
        read(Data(name="mnist", path=str(tmp_path)))
    assert fault in caught.value.message
    if "28, 27" not in fault:
        assert caught.value.where == str(named or tmp_path / file)


@pytest.mark.parametrize("keep", [0.0, 0.2, 0.5, 0.9])
def test_mnist_cut(tmp_path: Path, keep: float) -> None:
    small_mnist(tmp_path)
    file = tmp_path / "train-images-idx3-ubyte.gz"
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(InputError) as caught:
        read(Data(name="mnist", path=str(tmp_path)))
    assert caught.value.where == str(file)


@pytest.mark.data
def test_real_mnist_cut_in_half(data_root: Path, tmp_path: Path) -> None:
    folder = copied(data_root, "mnist", tmp_path)
    halve(folder / "train-images-idx3-ubyte.gz")
    refused("mnist", folder, folder / "train-images-idx3-ubyte.gz", "cut short")
    (folder / "train-images-idx3-ubyte.gz").unlink()
    refused("mnist", folder, folder / "train-images-idx3-ubyte.gz", "no such file")


@pytest.mark.data
def test_heart_disease_damaged(data_root: Path, tmp_path: Path) -> None:
    folder = copied(data_root, "heart_disease", tmp_path)
    file = folder / "processed.hungarian.data"
    whole = file.read_text()
    halve(file)
    refused("heart-disease", tmp_path, file, "UCI's file has 294")
    file.write_text(whole.replace("28,1,2,130", "28,1,2", 1))
    refused("heart-disease", tmp_path, file, "line 1 has 13 fields")
    file.write_text(whole.replace("28,1,2,130", "28,1,2,high", 1))
    refused("heart-disease", tmp_path, file, "line 1", "'high'")
    file.unlink()
    refused("heart-disease", tmp_path, file, "no such file")


@pytest.mark.data
def test_wisdm_damaged(data_root: Path, tmp_path: Path) -> None:
    file = copied(data_root, "wisdm_ar", tmp_path) / "WISDM_ar_v1.1_transformed.arff"
    whole = file.read_text()
    halve(file)
    refused("wisdm", tmp_path, file, "line ")
    lines = whole.splitlines(keepends=True)
    file.write_text("".join(lines[:3000]))
    refused("wisdm", file, file, "5418")
    file.write_text("".join(lines[:20]))
    refused("wisdm", file.parent, file, "@data")
    file.write_text(whole.replace(",Jogging", ",Flying", 1))
    refused("wisdm", file, file, "line 51", "'Flying'")


@pytest.mark.data
def test_tinyshakespeare_damaged(data_root: Path, tmp_path: Path) -> None:
    file = copied(data_root, "tinyshakespeare", tmp_path) / "input.txt"
    with pytest.raises(InputError, match="minimum = 200000"):
        read(Data.model_validate({"name": "tinyshakespeare", "path": str(file), "minimum": 200000}))
    with pytest.raises(InputError, match="must fill a window"):
        read(Data.model_validate({"name": "tinyshakespeare", "path": str(file), "minimum": 50}))
    halve(file)
    refused("tinyshakespeare", file, file, "cut short: 557697 of 1115394")
    file.write_bytes(b"\xff\xfe\x00")
    refused("tinyshakespeare", file, file, "not UTF-8")


def png(edge: int) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.new("L", (edge, edge), 255).save(stream, "PNG")
    return stream.getvalue()


def small_omniglot(folder: Path) -> None:
    for part in ("background", "evaluation"):
        with zipfile.ZipFile(folder / f"images_{part}.zip", "w") as archive:
            for drawer in (1, 2):
                archive.writestr(f"images_{part}/Greek/character01/01_{drawer:02d}.png", png(105))


def test_omniglot_damaged(tmp_path: Path) -> None:
    small_omniglot(tmp_path)
    data = read(Data(name="omniglot", path=str(tmp_path)))
    assert data.train["x"].shape == (2, 1, 28, 28)
    assert data.owner is not None
    assert data.owner.tolist() == ["drawer01", "drawer02"]
    file = tmp_path / "images_background.zip"
    whole = file.read_bytes()
    halve(file)
    refused("omniglot", tmp_path, file, "cut short")
    file.write_bytes(whole[:60] + b"????" + whole[64:])
    refused("omniglot", tmp_path, file)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("images_background/Greek/character01/01_01.png", png(105)[:60])
    refused("omniglot", tmp_path, file, "01_01.png' is damaged")
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("readme.txt", "nothing")
    refused("omniglot", tmp_path, file, "holds no .png")
    with pytest.raises(InputError, match="owner = 'writer'"):
        read(Data.model_validate({"name": "omniglot", "path": str(tmp_path), "owner": "writer"}))


def test_cifar10_damaged(tmp_path: Path) -> None:
    from PIL import Image

    stream = io.BytesIO()
    Image.new("RGB", (32, 32), (255, 0, 0)).save(stream, "JPEG", quality=95)
    for part in ("train", "test"):
        with zipfile.ZipFile(tmp_path / f"cifar10_jpeg_{part}.zip", "w") as archive:
            archive.writestr(f"{part}/frog/0000.jpg", stream.getvalue())
    data = read(Data(name="cifar10", path=str(tmp_path)))
    assert data.train["y"].tolist() == [6]
    np.testing.assert_allclose(data.train["x"].mean((0, 2, 3)), [1, 0, 0], atol=0.05)
    file = tmp_path / "cifar10_jpeg_test.zip"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("test/lion/0000.jpg", stream.getvalue())
    refused("cifar10", tmp_path, file, "test/lion/0000.jpg", "known class")
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("test/frog/0000.jpg", png(105))
    refused("cifar10", tmp_path, file, "105×105")


@pytest.mark.data
def test_real_cifar10_cut_in_half(data_root: Path, tmp_path: Path) -> None:
    (tmp_path / "cifar10_jpeg_test.zip").write_bytes(b"")
    file = tmp_path / "cifar10_jpeg_train.zip"
    with (data_root / "cifar10_jpeg" / file.name).open("rb") as whole:
        file.write_bytes(whole.read(26_000_000))
    refused("cifar10", tmp_path, file, "cut short")
