"""Prompts whose answers follow a rule."""

from __future__ import annotations

from typing import Literal

import numpy as np

from umbel.core import randomness
from umbel.core.errors import InputError
from umbel.core.settings import Count
from umbel.datasets.federated import Dataset, Info, Numbered


def synthetic_prompts(
    *,
    clients: Count = 4,
    prompts: Count = 64,
    test_prompts: Count = 32,
    rule: Literal["last", "copy", "reverse"] = "last",
    symbols: Count = 20,
    prompt: Count = 3,
    answer: Count = 3,
    data_seed: int = 0,
) -> Dataset:
    """Random prompts, whose right answer is the last symbol again and again, or the prompt itself.

    Args:
        clients: how many.
        prompts: of each client, for training.
        test_prompts: of each client, for its test part.
        rule: ``last``: the prompt's last symbol, each time; ``copy``: the prompt from its start;
            ``reverse``: from its end.
        symbols: that there are.
        prompt: symbols of a prompt.
        answer: symbols of an answer, at most as many as of the prompt unless ``rule`` is ``last``.
        data_seed: of the prompts.

    Raises:
        InputError: the answer is longer than what it is to be made of.
    """
    if rule != "last" and answer > prompt:
        raise InputError(
            f"answer = {answer} symbols of a prompt of {prompt}",
            where="[data]",
            fix=f"answer = {prompt}, or rule = 'last'",
        )
    draw = randomness.generator(data_seed, "synthetic prompts")
    x = draw.integers(symbols, size=(clients * (prompts + test_prompts), prompt))
    right = {"last": x[:, -1:].repeat(answer, 1), "copy": x, "reverse": x[:, ::-1]}[rule]
    whole = {"x": x, "answer": np.ascontiguousarray(right[:, :answer])}
    split = clients * prompts
    names = np.array(list(Numbered(clients)))
    return Dataset(
        Info("synthetic-prompts", (prompt,), vocabulary=symbols),
        {name: column[:split] for name, column in whole.items()},
        {name: column[split:] for name, column in whole.items()},
        owner=names.repeat(prompts),
        test_owner=names.repeat(test_prompts),
    )
