"""Omniglot, from its two zips."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from umbel.core.settings import Count
from umbel.datasets.federated import Dataset, Info
from umbel.datasets.files import damaged, folder, images

if TYPE_CHECKING:
    from PIL.Image import Image

FORMAT = (
    "Omniglot's images_background.zip and images_evaluation.zip, with "
    "<set>/<alphabet>/<character>/<id>_<drawer>.png inside"
)


def omniglot(
    *,
    path: str | None = None,
    owner: Literal["drawer", "character", "alphabet"] = "drawer",
    size: Count = 28,
) -> Dataset:
    """32,460 drawings of 1,623 characters by 20 drawers; the test set has characters of its own.

    The background set is for training (964 characters), the evaluation set for testing (659 others,
    numbered after them): for learning to learn. To classify known characters, hold examples out
    (``holdout`` or ``client_holdout``). Ink is 1, paper 0.

    Args:
        path: the folder of the two zips, or the one above it; ``None``: in ``UMBEL_DATA``.
        owner: who is a client. Files number the drawers of each alphabet 01 … 20; a number need not
            be the same person in two alphabets.
        size: edge of the images in pixels, resampled from 105 (Lanczos).

    Raises:
        InputError: a file is missing, damaged or cut short.

    Source: Lake, Salakhutdinov and Tenenbaum 2015, Science 350.
    """
    files = ["images_background.zip", "images_evaluation.zip"]
    place = folder("omniglot", path, files, FORMAT)
    train, characters, train_owner = _part(place / files[0], size, owner, 0)
    test, more, _ = _part(place / files[1], size, owner, characters)
    return Dataset(
        Info("omniglot", (1, size, size), classes=characters + more), train, test, train_owner
    )


def _part(
    path: Path, size: int, owner: str, first: int
) -> tuple[dict[str, npt.NDArray[Any]], int, npt.NDArray[np.str_]]:
    """One zip: its examples, how many characters it has, and who owns each example."""
    pixels: list[npt.NDArray[np.uint8]] = []

    def decode(image: Image) -> None:
        from PIL.Image import Resampling

        grey = image.convert("L")
        if grey.size != (size, size):
            grey = grey.resize((size, size), Resampling.LANCZOS)
        pixels.append(np.asarray(grey))

    found = images(path, ".png", FORMAT, decode)
    if odd := next((p for p in found if len(p) < 3 or "_" not in p[-1]), None):
        raise damaged(path, f"unexpected file '{'/'.join(odd)}'", FORMAT)
    names = [f"{p[-3]}/{p[-2]}" for p in found]
    characters, place = np.unique(np.array(names), return_inverse=True)
    owners = {
        "drawer": [f"drawer{p[-1].rpartition('_')[2].removesuffix('.png')}" for p in found],
        "character": names,
        "alphabet": [p[-3] for p in found],
    }
    x = 1 - np.divide(np.stack(pixels)[:, None], 255, dtype=np.float32)
    return {"x": x, "y": place.astype(np.int64) + first}, len(characters), np.array(owners[owner])
