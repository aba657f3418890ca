"""Stratified test parts, drawn for all clients at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from umbel.core.randomness import key, mix


def stratified(
    labels: npt.NDArray[np.int64],
    group: npt.NDArray[np.integer[Any]],
    share: float,
    seed: int,
    purpose: str,
) -> npt.NDArray[np.bool_]:
    """Which rows are set aside: ``share`` of each group, and of each class in it; shape (rows,).

    Guarantees: a group of n rows loses round(share · n), and never its last row; the count of each
    class in a group is within one of its share. Depends on nothing but the arguments.

    Args:
        labels: (rows,) classes.
        group: (rows,) 0 … groups-1: the client that holds each row.
        share: 0 ≤ share < 1.
        seed: of the run.
        purpose: what the draw is for.
    """
    sizes = np.bincount(group)
    taken = np.minimum(np.floor(sizes * share + 0.5).astype(np.int64), np.maximum(sizes - 1, 0))
    hashes = mix(key(seed, purpose), np.arange(len(labels), dtype=np.uint64))
    order = np.lexsort((hashes, labels, group))
    # Systematic sampling (Madow 1949): of the n rows of a group in the order of their classes,
    # every (n / taken)-th, from a random start.
    start = (mix(key(seed, purpose, "start"), np.arange(len(sizes), dtype=np.uint64)) >> 1) % (
        np.maximum(sizes, 1).astype(np.uint64)
    )
    of = group[order]
    place = np.arange(len(labels)) - (np.cumsum(sizes) - sizes)[of]
    n, t, s = sizes[of], taken[of], start.astype(np.int64)[of]
    aside = np.zeros(len(labels), dtype=bool)
    aside[order] = ((place + 1) * t + s) // n > (place * t + s) // n
    return aside
