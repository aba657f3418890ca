"""A user's own prompts with the answers that are right."""

from __future__ import annotations

import csv
import io

import numpy as np

from umbel.core.settings import Count
from umbel.datasets.federated import Dataset, Info
from umbel.datasets.files import damaged, one_file
from umbel.datasets.files import text as read
from umbel.datasets.tokenizers import tokenizer as named

FORMAT = "a .csv with a header line and columns prompt, answer and perhaps client"


def prompts(
    *,
    path: str | None = None,
    tokenizer: str = "characters",
    window: Count = 48,
    answer: Count = 16,
    client: str | None = None,
) -> Dataset:
    """Your own prompts with right answers: a .csv with a prompt and an answer in each line.

    Prompts are padded to ``window`` symbols and lose symbols at their beginning where they are
    longer; answers are padded to ``answer`` symbols.

    Args:
        path: the file, or the folder that holds it alone.
        tokenizer: ``characters``, ``bytes``, or a folder with a ``tokenizer.json``.
        window: symbols of a prompt.
        answer: symbols of an answer.
        client: column that names each row's owner; ``None``: nobody.

    Raises:
        InputError: the file is missing, a column is, a cell is empty, or an answer is too long; the
            line is named.
    """
    file = one_file(path, ".csv", FORMAT)
    lines = list(csv.DictReader(io.StringIO(read(file, FORMAT), newline="")))
    wanted = ["prompt", "answer", *([client] if client else [])]
    for column in wanted:
        if not lines or column not in lines[0]:
            raise damaged(file, f"no column '{column}', or no line below the header", FORMAT)
    symbols = named(tokenizer)
    asked, answers = [], []
    for number, line in enumerate(lines, 2):
        if missing := [c for c in wanted if not line[c]]:
            raise damaged(file, f"line {number}: '{missing[0]}' is empty", FORMAT)
        codes, right = symbols.encode(line["prompt"])[-window:], symbols.encode(line["answer"])
        if len(right) > answer:
            raise damaged(
                file, f"line {number}: an answer of {len(right)} symbols; answer = {answer}", FORMAT
            )
        asked.append(codes + [symbols.padding] * (window - len(codes)))
        answers.append(right + [symbols.padding] * (answer - len(right)))
    info = Info(
        "prompts",
        (window,),
        vocabulary=symbols.vocabulary,
        padding=symbols.padding,
        mask=symbols.mask,
    )
    train = {"x": np.array(asked, dtype=np.int64), "answer": np.array(answers, dtype=np.int64)}
    owner = np.array([line[client] for line in lines]) if client else None
    return Dataset(info, train, owner=owner)
