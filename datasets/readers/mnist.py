"""MNIST, from its four IDX files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from umbel.datasets.federated import Dataset, Info
from umbel.datasets.files import damaged, folder, gunzip

FORMAT = (
    "MNIST's four gzipped IDX files: {train,t10k}-images-idx3-ubyte.gz and "
    "{train,t10k}-labels-idx1-ubyte.gz"
)
PARTS = ("train", "t10k")


def mnist(*, path: str | None = None) -> Dataset:
    """70,000 handwritten digits of 28×28 pixels, 10 classes; IDX files of LeCun et al. 1998.

    Args:
        path: the folder of the four files, or the one above it; ``None``: in ``UMBEL_DATA``.

    Raises:
        InputError: a file is missing, damaged or cut short.
    """
    files = [f"{p}-{k}-ubyte.gz" for p in PARTS for k in ("images-idx3", "labels-idx1")]
    place = folder("mnist|MNIST", path, files, FORMAT)
    train, test = (_part(place, p) for p in PARTS)
    return Dataset(Info("mnist", (1, 28, 28), classes=10), train, test)


def _part(place: Path, part: str) -> dict[str, npt.NDArray[Any]]:
    images = _idx(place / f"{part}-images-idx3-ubyte.gz", 3)
    path = place / f"{part}-labels-idx1-ubyte.gz"
    labels = _idx(path, 1)
    if len(images) != len(labels):
        raise damaged(path, f"{len(labels)} labels for {len(images)} images", FORMAT)
    if images.shape[1:] != (28, 28) or labels.max(initial=0) > 9:
        message = f"images of shape {images.shape[1:]}, labels up to {labels.max(initial=0)}"
        raise damaged(path, f"{message}; MNIST has (28, 28) and 9", FORMAT)
    x = np.divide(images[:, None], 255, dtype=np.float32)
    return {"x": x, "y": labels.astype(np.int64)}


def _idx(path: Path, dimensions: int) -> npt.NDArray[np.uint8]:
    """An array of bytes: magic 0 0 8 d, d sizes of 4 bytes (big-endian), then the values."""
    content = gunzip(path, FORMAT)
    header = 4 + 4 * dimensions
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) < header:
        raise damaged(path, f"not an IDX file of {dimensions} dimension(s) of bytes", FORMAT)
    shape = tuple(int(n) for n in np.frombuffer(content[4:header], ">u4"))
    if len(content) - header != math.prod(shape):
        raise damaged(
            path,
            f"the header says {shape}, {math.prod(shape)} bytes; there are {len(content) - header}",
            FORMAT,
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)
