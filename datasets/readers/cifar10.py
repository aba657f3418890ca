"""CIFAR-10, from two zips of images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from umbel.datasets.federated import Dataset, Info
from umbel.datasets.files import damaged, folder, images

if TYPE_CHECKING:
    from PIL.Image import Image

FORMAT = (
    "cifar10_jpeg_train.zip and cifar10_jpeg_test.zip, with <part>/<class>/<number>.jpg inside, "
    "32×32 pixels"
)
CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip


def cifar10(*, path: str | None = None) -> Dataset:
    """60,000 colour photographs of 32×32 pixels, 10 classes; zips of JPEG files.

    JPEG loses a little: accuracies can differ slightly from those on the original binary files.

    Args:
        path: the folder of the two zips, or the one above it; ``None``: in ``UMBEL_DATA``.

    Raises:
        InputError: a file is missing, damaged or cut short.

    Source: Krizhevsky 2009, "Learning multiple layers of features from tiny images".
    """
    files = ["cifar10_jpeg_train.zip", "cifar10_jpeg_test.zip"]
    place = folder("cifar10|cifar10_jpeg", path, files, FORMAT)
    train, test = (_part(place / file) for file in files)
    return Dataset(Info("cifar10", (3, 32, 32), classes=10), train, test)


def _part(path: Path) -> dict[str, npt.NDArray[Any]]:
    pixels: list[npt.NDArray[np.uint8]] = []

    def decode(image: Image) -> None:
        rgb = image.convert("RGB")
        if rgb.size != (32, 32):
            raise ValueError(f"{rgb.size[0]}×{rgb.size[1]} pixels, not 32×32")
        pixels.append(np.asarray(rgb))

    found = images(path, ".jpg", FORMAT, decode)
    place = {name: number for number, name in enumerate(CLASSES)}
    if odd := next((p for p in found if len(p) < 2 or p[-2] not in place), None):
        raise damaged(path, f"'{'/'.join(odd)}' is in no folder of a known class", FORMAT)
    y = np.array([place[p[-2]] for p in found], dtype=np.int64)
    x = np.empty((len(y), 3, 32, 32), dtype=np.float32)
    np.divide(np.stack(pixels).transpose(0, 3, 1, 2), 255, out=x)
    return {"x": x, "y": y}
