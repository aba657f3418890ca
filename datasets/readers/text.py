"""A user's own texts."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from umbel.core.errors import InputError
from umbel.core.settings import Count
from umbel.datasets.federated import Dataset, Info
from umbel.datasets.files import damaged
from umbel.datasets.files import text as read
from umbel.datasets.tokenizers import tokenizer as named

FORMAT = "a folder of UTF-8 files *.txt, one for each client, or one such file"


def text(
    *,
    path: str | None = None,
    tokenizer: str = "characters",
    window: Count = 64,
    stride: Count | None = None,
) -> Dataset:
    """Your own texts for language models: a folder of .txt files, each a client's.

    Records are windows of symbols; the end of a text that fills no window is padded.

    Args:
        path: the folder, or one file.
        tokenizer: ``characters``, ``bytes``, or a folder with a ``tokenizer.json``.
        window: symbols of a record.
        stride: symbols from one record to the next; ``None``: ``window``, without overlap.

    Raises:
        InputError: no such folder, no .txt in it, or a file that is empty or not UTF-8.
    """
    if path is None:
        raise InputError("data set 'text' has no path", where="[data]", fix=f"path: {FORMAT}")
    base = Path(path).expanduser()
    found = [base] if base.is_file() else sorted(base.glob("*.txt"))
    if not found:
        raise InputError("no .txt file", where=str(base), fix=f"expected {FORMAT}")
    symbols = named(tokenizer)
    records, owners = [], []
    for file in found:
        codes = symbols.encode(read(file, FORMAT))
        if len(codes) < 2:
            raise damaged(file, f"{len(codes)} symbols: nothing to predict", FORMAT)
        for start in range(0, len(codes) - 1, stride or window):
            piece = codes[start : start + window]
            records.append(piece + [symbols.padding] * (window - len(piece)))
            owners.append(file.stem)
    info = Info(
        "text",
        (window,),
        vocabulary=symbols.vocabulary,
        padding=symbols.padding,
        mask=symbols.mask,
    )
    train = {"x": np.array(records, dtype=np.int64)}
    return Dataset(info, train, owner=np.array(owners) if len(found) > 1 else None)
