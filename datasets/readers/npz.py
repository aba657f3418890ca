"""A user's own arrays."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from umbel.core.settings import Count
from umbel.datasets.federated import Dataset, Info
from umbel.datasets.files import damaged, one_file, opening

FORMAT = (
    "an .npz with arrays x (rows, …) and y (rows,), and optionally client (rows,), x_test, y_test "
    "and client_test; no pickled objects"
)
NAMES = ("x", "y", "client", "x_test", "y_test", "client_test")


def npz(
    *,
    path: str | None = None,
    classes: Count | None = None,
    vocabulary: Count | None = None,
    columns: Sequence[str] = (),
) -> Dataset:
    """Your own arrays: x, y and optionally client, x_test, y_test, client_test in one .npz file.

    Integer ``y`` are classes 0, 1, …; real ``y`` are targets of a regression.

    Args:
        path: the file, or the folder that holds it alone.
        classes: how many, where the file need not show them all; ``None``: the largest label + 1.
        vocabulary: ``x`` holds symbols 0 … vocabulary - 1, not measurements.
        columns: names of further arrays (rows,) of whole numbers, such as a year, that experiences
            may go by; with a test part also each name + ``_test``.

    Raises:
        InputError: the file is missing, damaged, or not in this format.
    """
    file = one_file(path, ".npz", FORMAT)
    arrays = _arrays(file, columns)
    parts = ("", "_test") if "x_test" in arrays else ("",)
    for part in parts:
        _check(file, arrays, part, columns)
    y = np.concatenate([arrays[f"y{part}"] for part in parts])
    real = np.issubdtype(y.dtype, np.floating)
    if real and classes is not None:
        raise damaged(file, f"classes = {classes}, and y holds {y.dtype} targets", FORMAT)
    if not real:
        known = classes or int(y.max()) + 1
        if y.min() < 0 or y.max() >= known:
            message = f"y holds labels {y.min()} … {y.max()}, expected 0 … {known - 1}"
            raise damaged(file, message, FORMAT)
        classes = known
    for part in parts:
        arrays[f"x{part}"] = _inputs(file, arrays[f"x{part}"], f"x{part}", vocabulary)
        arrays[f"y{part}"] = arrays[f"y{part}"].astype(np.float32 if real else np.int64)
    shape = arrays["x"].shape[1:]
    if "x_test" in arrays and arrays["x_test"].shape[1:] != shape:
        message = f"x_test has examples of shape {arrays['x_test'].shape[1:]}, x of {shape}"
        raise damaged(file, message, FORMAT)
    targets = arrays["y"].shape[1] if arrays["y"].ndim == 2 else 1
    train, *test = ({n: arrays[f"{n}{p}"] for n in ("x", "y", *columns)} for p in parts)
    return Dataset(
        Info(file.stem, shape, classes, targets, vocabulary),
        train,
        test[0] if test else None,
        arrays["client"].astype(str) if "client" in arrays else None,
        arrays["client_test"].astype(str) if "client_test" in arrays else None,
    )


def _arrays(file: Path, columns: Sequence[str]) -> dict[str, npt.NDArray[Any]]:
    with opening(file, FORMAT):
        try:
            if not zipfile.is_zipfile(file):
                raise damaged(file, "not an .npz, or cut short", FORMAT)
            with np.load(file, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
        except ValueError as error:  # a pickled object, or an array that is shorter than it says
            raise damaged(file, str(error), FORMAT) from None
    for name in arrays:
        if name not in NAMES and name.removesuffix("_test") not in columns:
            raise damaged(file, f"unknown array '{name}'", FORMAT)
    needed = ["x", "y", *columns]
    if {"x_test", "y_test", "client_test"} & set(arrays):
        needed += [f"{name}_test" for name in needed]
    for name in needed:
        if name not in arrays:
            raise damaged(file, f"array '{name}' is missing", FORMAT)
    if ("client_test" in arrays) and "client" not in arrays:
        raise damaged(file, "'client_test' needs 'client'", FORMAT)
    return arrays


def _check(
    file: Path, arrays: dict[str, npt.NDArray[Any]], part: str, columns: Sequence[str]
) -> None:
    """Lengths, dimensions and kinds of the arrays of one part."""
    rows = arrays[f"x{part}"].shape[:1]
    for name in (f"{n}{part}" for n in columns):
        if arrays[name].dtype.kind not in "iu" or arrays[name].shape != rows:
            message = f"'{name}' holds {arrays[name].dtype} of shape {arrays[name].shape}"
            raise damaged(file, f"{message}, expected {rows} whole numbers", FORMAT)
    for name in (f"x{part}", f"y{part}", f"client{part}"):
        if name in arrays and (arrays[name].shape[:1] != rows or not rows or not rows[0]):
            message = f"'{name}' has shape {arrays[name].shape}, x{part} has {rows} rows"
            raise damaged(file, message, FORMAT)
    for name in (f"x{part}", f"y{part}"):
        if arrays[name].dtype.kind not in "biuf":
            message = f"'{name}' holds {arrays[name].dtype}, expected numbers"
            raise damaged(file, message, FORMAT)
        if not np.isfinite(arrays[name]).all():
            row = int(np.argwhere(~np.isfinite(arrays[name]))[0, 0])
            raise damaged(file, f"'{name}' is NaN or infinite in row {row}", FORMAT)
    if arrays[f"x{part}"].ndim < 2:
        raise damaged(file, f"'x{part}' has one dimension; a row needs features", FORMAT)
    kinds = {arrays[n].dtype.kind == "f" for n in ("y", "y_test") if n in arrays}
    y = arrays[f"y{part}"]
    if y.ndim > (2 if y.dtype.kind == "f" else 1) or len(kinds) > 1:
        message = f"'y{part}' has shape {y.shape} and dtype {y.dtype}"
        raise damaged(file, message, FORMAT)


def _inputs(file: Path, x: npt.NDArray[Any], name: str, vocabulary: int | None) -> npt.NDArray[Any]:
    if vocabulary is None:
        return x.astype(np.float32)
    if x.dtype.kind not in "iu" or x.min() < 0 or x.max() >= vocabulary:
        message = f"'{name}' holds {x.dtype} {x.min()} … {x.max()}, expected 0 … {vocabulary - 1}"
        raise damaged(file, message, FORMAT)
    return x.astype(np.int64)
