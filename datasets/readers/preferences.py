"""A user's own preferences between two completions."""

from __future__ import annotations

import csv
import io

import numpy as np

from umbel.core.settings import Count
from umbel.datasets.federated import Dataset, Info
from umbel.datasets.files import damaged, one_file
from umbel.datasets.files import text as read
from umbel.datasets.tokenizers import Tokenizer
from umbel.datasets.tokenizers import tokenizer as named

FORMAT = "a .csv with a header line and columns prompt, chosen, rejected and perhaps client"


def preferences(
    *,
    path: str | None = None,
    tokenizer: str = "characters",
    window: Count = 64,
    client: str | None = None,
) -> Dataset:
    """Your own preferences: a .csv with a prompt, a chosen and a rejected completion in each line.

    ``x`` is the prompt with what was chosen, ``rejected`` the prompt with what was not; both are
    padded to ``window`` symbols. Where they are longer, the prompt loses symbols at its beginning.

    Args:
        path: the file, or the folder that holds it alone.
        tokenizer: ``characters``, ``bytes``, or a folder with a ``tokenizer.json``.
        window: symbols of a record.
        client: column that names each row's owner; ``None``: nobody.

    Raises:
        InputError: the file is missing, a column is, a cell is empty, the two completions are the
            same, or one does not fit beside a symbol of its prompt; the line is named.
    """
    file = one_file(path, ".csv", FORMAT)
    lines = list(csv.DictReader(io.StringIO(read(file, FORMAT), newline="")))
    wanted = ["prompt", "chosen", "rejected", *([client] if client else [])]
    for column in wanted:
        if not lines or column not in lines[0]:
            raise damaged(file, f"no column '{column}', or no line below the header", FORMAT)
    symbols = named(tokenizer)
    chosen, rejected, prompts = [], [], []
    for number, line in enumerate(lines, 2):
        if missing := [c for c in wanted if not line[c]]:
            raise damaged(file, f"line {number}: '{missing[0]}' is empty", FORMAT)
        prompt = symbols.encode(line["prompt"])
        ends = [symbols.encode(line[side]) for side in ("chosen", "rejected")]
        if ends[0] == ends[1]:
            raise damaged(file, f"line {number}: both completions are the same", FORMAT)
        room = window - max(map(len, ends))
        if room < 1 or not prompt:
            longest = max(map(len, ends))
            raise damaged(
                file, f"line {number}: {longest} symbols of a completion; window = {window}", FORMAT
            )
        prompt = prompt[-room:]
        chosen.append(_filled(prompt + ends[0], window, symbols))
        rejected.append(_filled(prompt + ends[1], window, symbols))
        prompts.append(len(prompt))
    info = Info(
        "preferences",
        (window,),
        vocabulary=symbols.vocabulary,
        padding=symbols.padding,
        mask=symbols.mask,
    )
    train = {
        "x": np.array(chosen, dtype=np.int64),
        "rejected": np.array(rejected, dtype=np.int64),
        "prompt": np.array(prompts, dtype=np.int64),
    }
    owner = np.array([line[client] for line in lines]) if client else None
    return Dataset(info, train, owner=owner)


def _filled(codes: list[int], window: int, symbols: Tokenizer) -> list[int]:
    return codes + [symbols.padding] * (window - len(codes))
