"""A picture is drawn for few and many clients, classes and targets, and shows what it should."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from umbel.core.run_file import Data
from umbel.datasets.build import load
from umbel.datasets.federated import FederatedData, Holdings, Info, Numbered
from umbel.datasets.plots import draw_split


def drawn(data: FederatedData, folder: Path) -> Any:
    from PIL import Image

    draw_split(data, folder / "split.png", "A split")
    with Image.open(folder / "split.png") as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize(
    "table",
    [
        {"name": "digits", "split": {"kind": "dirichlet", "clients": 20}},
        {"name": "digits", "split": {"kind": "shards", "clients": 61}},
        {"name": "digits", "split": {"kind": "iid", "clients": 1000}},
        {"name": "diabetes"},
        {"name": "breast-cancer", "split": {"kind": "iid", "clients": 1}},
    ],
)
def test_a_picture_of_a_split(table: dict[str, Any], tmp_path: Path) -> None:
    picture = drawn(load(Data.model_validate(table), 0), tmp_path)
    assert min(picture.shape[:2]) > 300
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 10


def test_bars_show_the_shares_of_the_classes(tmp_path: Path) -> None:
    y = np.repeat([0, 1], [30, 90])
    held = Holdings.of([np.arange(120)])
    data = FederatedData(
        Info("own", (1,), 2), Numbered(1), {"x": y, "y": y}, held, None, None, None
    )
    picture = drawn(data, tmp_path)
    blue = (picture == [31, 119, 180]).all(2)  # the first two colours of tab10
    orange = (picture == [255, 127, 14]).all(2)
    row = int(blue.sum(1).argmax())
    middle = [int(m.sum(1)[row // 2 :].max()) for m in (blue, orange)]
    assert middle[1] / middle[0] == pytest.approx(3, rel=0.1)


def test_many_classes_are_a_map(tmp_path: Path) -> None:
    y = np.arange(600) % 100
    held = Holdings.of(np.array_split(np.arange(600), 5))
    info = Info("own", (1,), 100)
    data = FederatedData(info, Numbered(5), {"x": y, "y": y}, held, None, None, None)
    assert drawn(data, tmp_path).shape[1] == 1500
