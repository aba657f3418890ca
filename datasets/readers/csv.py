"""A user's own table."""

from __future__ import annotations

import csv as tables
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from umbel.core.errors import InputError, suggest
from umbel.datasets.columns import standardised
from umbel.datasets.federated import Dataset, Info
from umbel.datasets.files import damaged, one_file, opening, text

FORMAT = "a .csv with a header line, numeric feature columns and a target column"


def csv(
    *,
    path: str | None = None,
    target: str | None = None,
    client: str | None = None,
    regression: bool = False,
    standardise: bool = False,
    labels: Annotated[tuple[str, ...] | None, Field(strict=False)] = None,
) -> Dataset:
    """Your own table: a .csv with a header, numeric features, a target and optionally a client.

    Targets are classes: whole numbers 0, 1, … as they are, anything else numbered in the order of
    ``labels``, or else of the alphabet.

    Args:
        path: the file, or the folder that holds it alone.
        target: column of the target; ``None``: the last that is not ``client``.
        client: column that names each row's owner.
        regression: the target is a real number.
        standardise: every feature minus its mean, over its deviation, over the whole table.
        labels: names of the classes, so that several sites number them alike.

    Raises:
        InputError: the file is missing, a line is ragged, or a cell is not what its column needs;
            line and column are named.
    """
    file = one_file(path, ".csv", FORMAT)
    header, lines, numbers = _read(file)
    if client is not None:
        _require(file, client, header)
    names = [name for name in header if name != client]
    target = names[-1] if target is None and names else target
    _require(file, target, names)
    features = [i for i, name in enumerate(header) if name not in (target, client)]
    if not features:
        raise damaged(file, "no feature column", FORMAT)
    table = np.stack([_numbers(file, lines, numbers, header, i) for i in features], axis=1)
    place = header.index(str(target))
    classes: int | None = None
    y: npt.NDArray[Any]
    if regression:
        y = _numbers(file, lines, numbers, header, place).astype(np.float32)
    else:
        y, classes = _classes(file, [line[place] for line in lines], numbers, str(target), labels)
    owner = None
    if client is not None:
        owner = np.array([line[header.index(client)] for line in lines])
        if not owner.astype(bool).all():
            row = numbers[int(np.argmin(owner.astype(bool)))]
            raise damaged(file, f"line {row}, column '{client}': empty", FORMAT)
    x = standardised(table) if standardise else table.astype(np.float32)
    return Dataset(Info(file.stem, (len(features),), classes), {"x": x, "y": y}, owner=owner)


def _read(file: Path) -> tuple[list[str], list[list[str]], list[int]]:
    """Header, rows, and the line of the file on which each row ends."""
    rows, numbers = [], []
    with opening(file, FORMAT):
        reader = tables.reader(io.StringIO(text(file, FORMAT).lstrip("\ufeff")), strict=True)
        try:
            for row in reader:
                if row:
                    rows.append([cell.strip() for cell in row])
                    numbers.append(reader.line_num)
        except tables.Error as error:
            raise damaged(file, f"line {reader.line_num}: {error}", FORMAT) from None
    if len(rows) < 2:
        raise damaged(file, "no rows below a header line", FORMAT)
    header = rows[0]
    if twice := next((name for name in header if header.count(name) > 1), None):
        raise damaged(file, f"column '{twice}' is there twice", FORMAT)
    for number, row in zip(numbers, rows, strict=True):
        if len(row) != len(header):
            message = f"line {number} has {len(row)} fields, the header has {len(header)}"
            raise damaged(file, message, FORMAT)
    return header, rows[1:], numbers[1:]


def _require(file: Path, column: str | None, header: Sequence[str]) -> None:
    if column not in header:
        fix = suggest(column or "", header)
        raise InputError(f"no column '{column}'", where=str(file), fix=fix)


def _numbers(
    file: Path, lines: list[list[str]], numbers: list[int], header: list[str], place: int
) -> npt.NDArray[np.float64]:
    """One column as finite numbers."""
    values = np.empty(len(lines))
    for row, line in enumerate(lines):
        try:
            values[row] = float(line[place])
        except ValueError:
            values[row] = np.nan
    if not np.isfinite(values).all():
        row = int(np.argmin(np.isfinite(values)))
        cell = lines[row][place]
        message = f"line {numbers[row]}, column '{header[place]}': '{cell}' is not a finite number"
        raise damaged(file, message, FORMAT)
    return values


def _classes(
    file: Path,
    cells: list[str],
    numbers: list[int],
    target: str,
    labels: tuple[str, ...] | None,
) -> tuple[npt.NDArray[np.int64], int]:
    """The class of each row, and how many there are."""
    present = set(cells)
    if labels is None and all(_whole(cell) for cell in present):
        y = np.array([int(float(cell)) for cell in cells], dtype=np.int64)
        classes = int(y.max()) + 1
        if y.min() < 0 or classes > len(y):
            raise damaged(
                file,
                f"column '{target}' holds {y.min()} … {y.max()} in {len(y)} rows; not classes 0, "
                "1, …; regression = true?",
                FORMAT,
            )
        return y, classes
    if labels is None and all(_number(cell) for cell in present):
        message = f"column '{target}' holds real numbers, not classes; regression = true?"
        raise damaged(file, message, FORMAT)
    order = list(labels or sorted(present))
    unknown = next((cell for cell in cells if cell not in order or not cell), None)
    if unknown is not None:
        line = numbers[cells.index(unknown)]
        message = f"line {line}, column '{target}': '{unknown}' is not one of {', '.join(order)}"
        raise damaged(file, message, FORMAT)
    return np.array([order.index(cell) for cell in cells], dtype=np.int64), len(order)


def _number(cell: str) -> bool:
    try:
        return math.isfinite(float(cell))
    except ValueError:
        return False


def _whole(cell: str) -> bool:
    return _number(cell) and float(cell).is_integer()
