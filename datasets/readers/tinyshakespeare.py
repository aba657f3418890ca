"""Tiny Shakespeare: next-character prediction, one client a speaker."""

from __future__ import annotations

import re
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from umbel.core.errors import InputError
from umbel.core.settings import Count, Share
from umbel.datasets.federated import Dataset, Info
from umbel.datasets.files import damaged, folder, text

FORMAT = "input.txt of char-rnn: 1,115,394 characters of 'NAME:' lines, each with a speech below"
LENGTH = 1_115_394
# A name stands alone on the first line after an empty one; some editions leave two empty.
NAME = re.compile(r"(?:\A|(?<=\n\n))\n*([^\n:]+):\n")


def tinyshakespeare(
    *,
    path: str | None = None,
    window: Count = 80,
    stride: Count = 8,
    minimum: Count = 2000,
    train_share: Share = 0.8,
    speakers: Literal["all", "even", "odd"] = "all",
) -> Dataset:
    """Shakespeare's plays, the next of 65 characters from the last 80; 99 speakers are clients.

    As in LEAF, windows run over all that a speaker says, in order; the last part of it is the
    speaker's own test text, which no training window touches.

    Args:
        path: ``input.txt``, its folder, or the one above; ``None``: in ``UMBEL_DATA``.
        window: characters that a prediction sees.
        stride: characters from one window to the next; LEAF's 1 gives eight times the examples and
            needs half a gigabyte.
        minimum: speakers with fewer characters are left out.
        train_share: share of each speaker's text, from its beginning, that is for training.
        speakers: every other one, in the order of their names: to pre-train on some, and go on with
            others.

    Raises:
        InputError: the file is missing or cut short, or no speaker has ``minimum`` characters.

    Source: Caldas et al. 2018, LEAF (arXiv:1812.01097); McMahan et al. 2017, section 3; Karpathy's
    char-rnn for the text.
    """
    file = folder("tinyshakespeare|shakespeare", path, ["input.txt"], FORMAT) / "input.txt"
    play = text(file, FORMAT)
    if len(play) < LENGTH:
        raise damaged(file, f"cut short: {len(play)} of {LENGTH} characters", FORMAT)
    speeches: dict[str, list[str]] = {}
    pieces = NAME.split(play)
    for name, speech in zip(pieces[1::2], pieces[2::2], strict=True):
        speeches.setdefault(name, []).append(speech.strip("\n") + "\n")
    said = {name: "".join(parts) for name, parts in sorted(speeches.items())}
    chosen = {name: words for name, words in said.items() if len(words) >= minimum}
    if speakers != "all":
        first = int(speakers == "odd")
        chosen = {name: chosen[name] for name in list(chosen)[first::2]}
    if not chosen or int(min(map(len, chosen.values())) * train_share) <= window:
        longest = max(map(len, said.values()))
        raise InputError(
            f"minimum = {minimum} with window = {window} and train_share = {train_share}: speakers "
            f"must fill a window; the longest says {longest} characters",
            where="[data]",
            fix=f"{int(window / train_share) + 2} ≤ minimum ≤ {longest}",
        )
    alphabet = np.array(sorted(set(play)))
    train, owner = _windows(chosen, alphabet, window, stride, (0.0, train_share))
    test, test_owner = _windows(chosen, alphabet, window, stride, (train_share, 1.0))
    info = Info("tinyshakespeare", (window,), classes=len(alphabet), vocabulary=len(alphabet))
    return Dataset(info, train, test, owner, test_owner)


def _windows(
    said: dict[str, str],
    alphabet: npt.NDArray[np.str_],
    window: int,
    stride: int,
    share: tuple[float, float],
) -> tuple[dict[str, npt.NDArray[Any]], npt.NDArray[np.str_]]:
    """Windows and next characters of this share of each speaker's words, and whose they are."""
    xs, ys, sizes = [], [], []
    for words in said.values():
        begin, end = (int(len(words) * s) for s in share)
        codes = np.searchsorted(alphabet, np.array(list(words[begin:end]), dtype=alphabet.dtype))
        starts = np.arange(0, max(len(codes) - window, 0), stride)
        xs.append(codes[starts[:, None] + np.arange(window)])
        ys.append(codes[starts + window])
        sizes.append(len(starts))
    arrays = {"x": np.concatenate(xs).astype(np.int64), "y": np.concatenate(ys).astype(np.int64)}
    return arrays, np.repeat(np.array(list(said)), sizes)
