"""What a client keeps of its earlier examples, to train on again; it never leaves the client."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from umbel.core.errors import InputError
from umbel.core.randomness import key, mix

PER_CLASS = 40

Rows = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Buffer:
    """How much is kept, and which.

    The examples kept are those of the smallest hashes: of all met so far (``reservoir``), or of
    each class (``balanced``). That is a uniform sample. Or of each class those that come first by
    :func:`herded`. A later buffer holds of earlier examples only what the one before it held:
    nothing that was dropped ever comes back.

    Args:
        per_class: the most of one class; ``None``: no such bound.
        examples: the most in all.
        bytes: the same, as the memory that they take.
        choice: by what they are chosen.
        repeat: whether they are repeated in an epoch until they are as many as the new ones.

    Source: bottom-k sampling (Cohen and Kaplan 2007), which is reservoir sampling (Vitter 1985) by
    fixed priorities.
    """

    per_class: int | None
    examples: int | None
    bytes: int | None
    choice: Literal["balanced", "reservoir", "herding"]
    repeat: bool

    @classmethod
    def bounded(
        cls,
        per_class: int | None,
        examples: int | None,
        bytes: int | None,
        choice: Literal["balanced", "reservoir", "herding"],
        repeat: bool,
    ) -> Buffer:
        """A buffer with a bound: 40 of each class, where none is given.

        Raises:
            InputError: a reservoir with a bound on each class, or without one on the whole.
        """
        free = examples is None and bytes is None
        if choice == "reservoir" and (free or per_class is not None):
            raise InputError(
                "a reservoir is bounded as a whole, and not class by class",
                where="[continual] defence",
                fix="set examples = 400 without per_class, or choice = 'balanced'",
            )
        return cls(
            PER_CLASS if free and per_class is None else per_class, examples, bytes, choice, repeat
        )

    def kept(
        self,
        met: list[Rows],
        labels: npt.NDArray[np.integer],
        row_bytes: int,
        seed: int,
        client: str,
        ranks: npt.NDArray[np.integer] | None = None,
    ) -> Rows:
        """The rows that are kept.

        Args:
            met: what the client has met, an array a stage, in order.
            labels: of all rows.
            row_bytes: what one example takes.
            seed: of the run.
            client: its name.
            ranks: of all rows met, one after another: the smallest are kept; ``None``: hashes.
        """
        rows = np.concatenate([np.zeros(0, np.int32), *met])
        hashes = mix(key(seed, "replay", client), rows.astype(np.uint64))
        ranked = rows[np.argsort(hashes if ranks is None else ranks, kind="stable")]
        bounds = [b for b in (self.examples, self._rows(row_bytes)) if b is not None]
        room = min(bounds, default=len(rows))
        if self.choice == "reservoir":
            return ranked[:room]
        # In the order in which they were first met, so that no class's share ever grows again.
        classes = list(dict.fromkeys(labels[rows].tolist()))
        parts = []
        for place, label in enumerate(classes):
            share = -(-(room - place) // len(classes)) if bounds else len(rows)
            share = share if self.per_class is None else min(share, self.per_class)
            parts.append(ranked[labels[ranked] == label][: max(0, share)])
        return np.concatenate([np.zeros(0, np.int32), *parts])

    def _rows(self, row_bytes: int) -> int | None:
        return None if self.bytes is None else self.bytes // row_bytes


def replayed(new: Rows, old: Rows, *, repeat: bool) -> Rows:
    """The rows of an epoch: the new ones, then the old ones, repeated up to as many."""
    if repeat and 0 < len(old) < len(new):
        old = np.resize(old, len(new))
    return np.concatenate([new, old])


def herded(features: npt.NDArray[np.floating[Any]], most: int | None) -> npt.NDArray[np.int64]:
    """The order in which examples of one class are taken, (rows,): each brings the mean of those
    taken so far as near to the mean of all as one example can.

    Args:
        features: (rows, features).
        most: how many are taken so; the rest follow as they come. ``None``: all.

    Source: Rebuffi et al. 2017, iCaRL, Algorithm 4 (arXiv:1611.07725).
    """
    wide = np.asarray(features, np.float64)
    wanted, total = wide.mean(0), np.zeros(wide.shape[1])
    left = np.ones(len(wide), dtype=np.bool_)
    taken: list[int] = []
    for count in range(1, min(len(wide), len(wide) if most is None else most) + 1):
        apart = np.square(wanted - (total + wide) / count).sum(1)
        best = int(np.where(left, apart, np.inf).argmin())
        total += wide[best]
        left[best] = False
        taken.append(best)
    return np.array([*taken, *np.flatnonzero(left)], dtype=np.int64)
