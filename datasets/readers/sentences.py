"""A user's own texts with a class each."""

from __future__ import annotations

import csv
import io
from typing import Annotated

import numpy as np
from pydantic import Field

from umbel.core.settings import Count
from umbel.datasets.federated import Dataset, Info
from umbel.datasets.files import damaged, one_file
from umbel.datasets.files import text as read
from umbel.datasets.tokenizers import tokenizer as named

FORMAT = "a .csv with a header line and columns for text, label and perhaps client"


def sentences(
    *,
    path: str | None = None,
    tokenizer: str = "characters",
    window: Count = 64,
    text: str = "text",
    label: str = "label",
    client: str | None = None,
    labels: Annotated[tuple[str, ...] | None, Field(strict=False)] = None,
) -> Dataset:
    """Your own texts to be classified: a .csv with a text and a label in each line.

    Texts are cut after ``window`` symbols, and padded to as many.

    Args:
        path: the file, or the folder that holds it alone.
        tokenizer: ``characters``, ``bytes``, or a folder with a ``tokenizer.json``.
        window: symbols of a record.
        text: column of the text.
        label: column of the class.
        client: column that names each row's owner; ``None``: nobody.
        labels: names of the classes, so that several sites number them alike; ``None``: those that
            occur, in the order of the alphabet.

    Raises:
        InputError: the file is missing, a column is, or a line lacks a text or has a label that is
            not among ``labels``; the line is named.
    """
    file = one_file(path, ".csv", FORMAT)
    lines = list(csv.DictReader(io.StringIO(read(file, FORMAT), newline="")))
    wanted = [text, label, *([client] if client else [])]
    for column in wanted:
        if not lines or column not in lines[0]:
            raise damaged(file, f"no column '{column}', or no line below the header", FORMAT)
    for number, line in enumerate(lines, 2):
        if missing := [c for c in wanted if not line[c]]:
            raise damaged(file, f"line {number}: '{missing[0]}' is empty", FORMAT)
    names = list(labels or sorted({line[label] for line in lines}))
    symbols = named(tokenizer)
    records, classes = [], []
    for number, line in enumerate(lines, 2):
        if line[label] not in names:
            raise damaged(file, f"line {number}: unknown label '{line[label]}'", FORMAT)
        codes = symbols.encode(line[text])[:window]
        records.append(codes + [symbols.padding] * (window - len(codes)))
        classes.append(names.index(line[label]))
    info = Info(
        "sentences",
        (window,),
        classes=len(names),
        vocabulary=symbols.vocabulary,
        padding=symbols.padding,
        mask=symbols.mask,
    )
    train = {"x": np.array(records, dtype=np.int64), "y": np.array(classes, dtype=np.int64)}
    owner = np.array([line[client] for line in lines]) if client else None
    return Dataset(info, train, owner=owner)
