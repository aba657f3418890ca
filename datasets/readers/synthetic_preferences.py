"""Preferences whose truth is known."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from umbel.core import randomness
from umbel.core.settings import Count, Fraction, NonNegative
from umbel.datasets.federated import Dataset, Info, Numbered


def synthetic_preferences(
    *,
    clients: Count = 8,
    pairs: Count = 200,
    test_pairs: Count = 50,
    flips: Fraction = 0.1,
    plurality: NonNegative = 0.0,
    symbols: Count = 16,
    prompt: Count = 4,
    length: Count = 12,
    data_seed: int = 0,
) -> Dataset:
    """Pairs of random texts; a client prefers the one whose symbols it likes more, but for flips.

    A client's taste is a number for each symbol: the common one, and ``plurality`` times its own,
    both standard normal. A share ``flips`` of its training pairs is the wrong way round; its test
    pairs tell the truth.

    Args:
        clients: how many.
        pairs: of each client, for training.
        test_pairs: of each client, for its test part.
        flips: share of the training pairs.
        plurality: how far tastes are apart; 0: all are one.
        symbols: that there are.
        prompt: symbols of a prompt.
        length: symbols of a completion.
        data_seed: of the tastes and the pairs.
    """
    draw = randomness.generator(data_seed, "synthetic preferences")
    common = draw.standard_normal(symbols)
    train: list[dict[str, npt.NDArray[np.int64]]] = []
    test: list[dict[str, npt.NDArray[np.int64]]] = []
    for _ in range(clients):
        taste = common + plurality * draw.standard_normal(symbols)
        for part, count, wrong in ((train, pairs, flips), (test, test_pairs, 0.0)):
            begin = draw.integers(symbols, size=(count, prompt))
            ends = draw.integers(symbols, size=(count, 2, length))
            worth = taste[ends].mean(2)
            better = (worth[:, 1] > worth[:, 0]) ^ (draw.random(count) < wrong)
            row = np.arange(count)
            part.append(
                {
                    "x": np.concatenate([begin, ends[row, better.astype(int)]], 1),
                    "rejected": np.concatenate([begin, ends[row, 1 - better]], 1),
                    "prompt": np.full(count, prompt, np.int64),
                }
            )
    names = np.array(list(Numbered(clients)))
    info = Info("synthetic-preferences", (prompt + length,), vocabulary=symbols)
    return Dataset(
        info,
        _joined(train),
        _joined(test),
        owner=names.repeat(pairs),
        test_owner=names.repeat(test_pairs),
    )


def _joined(
    parts: list[dict[str, npt.NDArray[np.int64]]],
) -> dict[str, npt.NDArray[np.int64]]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
