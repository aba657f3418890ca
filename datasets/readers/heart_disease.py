"""UCI heart disease: four hospitals, prepared as in FLamby."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from umbel.datasets.columns import standardised
from umbel.datasets.federated import Dataset, Info
from umbel.datasets.files import damaged, folder, text

FORMAT = "UCI's processed.<hospital>.data: 14 numbers or '?' a line, separated by commas"
PATIENTS = {"cleveland": 303, "hungarian": 294, "switzerland": 123, "va": 200}
INCOMPLETE = (10, 11, 12)
"""Columns that most hospitals left empty: slope, vessels, thal."""
CATEGORICAL = (2, 6)
"""Chest pain, resting ECG."""


def heart_disease(*, path: str | None = None) -> Dataset:
    """740 patients of four hospitals, 13 features, disease or not; prepared as FLamby's.

    Three incomplete columns and patients with gaps are dropped, two columns are made indicators,
    each hospital keeps a stratified third as its own test part (199 + 104, 172 + 89, 30 + 16 and
    85 + 45 patients) and standardises by its own training part. A column that is constant there
    becomes 0 in training, where FLamby divides by 1e-9.

    Args:
        path: the folder of the four files, or the one above it; ``None``: in ``UMBEL_DATA``.

    Raises:
        InputError: a file is missing, damaged or cut short.

    Source: du Terrail et al. 2022, Fed-Heart-Disease (arXiv:2210.04620); Janosi et al. 1988, UCI.
    """
    files = [f"processed.{hospital}.data" for hospital in PATIENTS]
    place = folder("heart_disease|heart-disease|fed_heart_disease", path, files, FORMAT)
    tables = [_table(place / f"processed.{h}.data", n) for h, n in PATIENTS.items()]
    sizes = [len(t) for t in tables]
    pooled = np.concatenate(tables)
    features = _indicators(pooled[:, :-1])
    labels = (pooled[:, -1] > 0).astype(np.int64)
    owner = np.repeat(np.array(list(PATIENTS)), sizes)
    x: npt.NDArray[np.float32] = np.empty(features.shape, dtype=np.float32)
    in_test = np.zeros(len(labels), dtype=bool)
    for start, size in zip(np.cumsum([0, *sizes[:-1]]), sizes, strict=True):
        own = slice(start, start + size)
        in_test[own] = _test_third(labels[own])
        # FLamby takes float32 values and the unbiased variance (torch's std).
        x[own] = standardised(features[own], of=features[own][~in_test[own]], ddof=1)
    return Dataset(
        Info("heart-disease", (features.shape[1],), classes=2),
        {"x": x[~in_test], "y": labels[~in_test]},
        {"x": x[in_test], "y": labels[in_test]},
        owner[~in_test],
        owner[in_test],
    )


def _table(path: Path, patients: int) -> npt.NDArray[np.float64]:
    """The complete patients of one hospital: 10 features and the label, shape (rows, 11)."""
    lines = text(path, FORMAT).splitlines()
    if len(lines) != patients:
        raise damaged(path, f"{len(lines)} patients; UCI's file has {patients}", FORMAT)
    kept = []
    for number, line in enumerate(lines, 1):
        fields = line.split(",")
        if len(fields) != 14:
            raise damaged(path, f"line {number} has {len(fields)} fields, not 14", FORMAT)
        wanted = [f.strip() for i, f in enumerate(fields) if i not in INCOMPLETE]
        if "?" in wanted:
            continue
        try:
            kept.append([float(f) for f in wanted])
        except ValueError as error:
            raise damaged(path, f"line {number}: {error}", FORMAT) from None
    return np.array(kept)


def _indicators(features: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The other columns, then an indicator of each level but the lowest of the categorical ones."""
    columns = [features[:, i] for i in range(features.shape[1]) if i not in CATEGORICAL]
    for i in CATEGORICAL:
        columns += [features[:, i] == level for level in np.unique(features[:, i])[1:]]
    return np.stack(columns, axis=1).astype(np.float64)


def _test_third(labels: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Which patients of one hospital are FLamby's test part, shape (rows,)."""
    from sklearn.model_selection import train_test_split

    levels, counts = np.unique(labels, return_counts=True)
    parts: list[Any] = train_test_split(
        np.arange(len(labels)),
        train_size=0.66,
        test_size=1.0 - 0.66,
        random_state=43,
        shuffle=True,
        stratify=labels if len(levels) > 1 and counts.min() > 2 else None,
    )
    chosen = np.zeros(len(labels), dtype=bool)
    chosen[parts[1]] = True
    return chosen
