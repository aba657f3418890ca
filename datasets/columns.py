"""Small functions of whole columns: standardisation, classes of labels, ranks of targets."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

BINS = 10
"""Real-valued targets are stratified and split by these quantiles, deciles, as if by classes."""


def standardised(
    x: npt.NDArray[Any], of: npt.NDArray[Any] | None = None, ddof: int = 0
) -> npt.NDArray[np.float32]:
    """Each column minus its mean over its standard deviation, float32; a constant column gives 0.

    Args:
        x: (rows, …), real.
        of: the rows that mean and deviation are taken from, if not ``x`` itself.
        ddof: 1 for the unbiased variance.
    """
    wide = np.asarray(x, np.float64)
    base = wide if of is None else np.asarray(of, np.float64)
    std = base.std(axis=0, ddof=ddof)
    # A constant column can have a tiny deviation from the rounding of its mean.
    constant = base.max(axis=0) == base.min(axis=0)
    mean = np.where(constant, base[0], base.mean(axis=0))
    scaled: npt.NDArray[np.float64] = (wide - mean) / np.where(constant, 1.0, std)
    return scaled.astype(np.float32)


def strata(y: npt.NDArray[Any], classes: int | None) -> npt.NDArray[np.int64]:
    """The class of each row, shape (rows,); for real targets, the decile of the first of them.

    Splits by label and stratified test parts of a regression set go by these deciles.
    """
    if classes is not None:
        return np.asarray(y, np.int64)
    target = y.reshape(len(y), -1)[:, 0]
    inner = np.quantile(target, np.arange(1, BINS) / BINS)
    return np.searchsorted(inner, target, side="right").astype(np.int64)
