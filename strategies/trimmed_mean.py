"""Coordinate-wise trimmed mean."""

from __future__ import annotations

from torch import Tensor

from umbel.core.settings import Count, Fraction, Natural, Positive
from umbel.strategies.parts import Strategy
from umbel.strategies.parts.robust import Before, Rule, robust
from umbel.strategies.parts.robust_mixing import ClipNorm, Mixing


def trimmed_mean(
    *,
    f: Natural,
    mixing: Mixing = "none",
    bucket_size: Count = 2,
    clip_norm: ClipNorm = None,
    client_momentum: Fraction = 0.0,
    server_lr: Positive = 1.0,
) -> Strategy:
    """Mean of each coordinate without its f lowest and f highest. Yin et al. 2018, Definition 2.

    arXiv:1803.01498; f = 0 is the plain mean.

    Args:
        f: hostile clients in a cohort that it must stand.
        mixing: pre-step that averages each delta with its n - f - 1 nearest, or random buckets.
        bucket_size: ``bucketing``: deltas a bucket.
        clip_norm: bound on the L2 norm of each delta, before all else; ``adaptive``: a quantile.
        client_momentum: of the deltas, kept at each client (Karimireddy et al. 2021).
        server_lr: factor on the result, as in FedAvg.
    """

    def columns(rows: Tensor) -> Tensor:
        return rows.sort(0).values[f : len(rows) - f].mean(0)

    rule = Rule(f"trimmed-mean with f = {f}", 2 * f + 1, "n > 2f", columns)
    return robust(rule, Before(f, mixing, bucket_size, clip_norm), server_lr, client_momentum)
