"""Mean around the median."""

from __future__ import annotations

from umbel.core.settings import Count, Fraction, Natural, Positive
from umbel.strategies.parts import Strategy
from umbel.strategies.parts.robust import Before, Rule, robust
from umbel.strategies.parts.robust_mixing import ClipNorm, Mixing
from umbel.strategies.parts.robust_rows import nearest_median


def meamed(
    *,
    f: Natural,
    mixing: Mixing = "none",
    bucket_size: Count = 2,
    clip_norm: ClipNorm = None,
    client_momentum: Fraction = 0.0,
    server_lr: Positive = 1.0,
) -> Strategy:
    """MeaMed: mean of the n - f values of each coordinate nearest its median. Xie et al. 2018.

    Definition 10 (arXiv:1802.10116).

    Args:
        f: hostile clients in a cohort that it must stand.
        mixing: pre-step that averages each delta with its n - f - 1 nearest, or random buckets.
        bucket_size: ``bucketing``: deltas a bucket.
        clip_norm: bound on the L2 norm of each delta, before all else; ``adaptive``: a quantile.
        client_momentum: of the deltas, kept at each client (Karimireddy et al. 2021).
        server_lr: factor on the result, as in FedAvg.
    """
    rule = Rule(
        f"meamed with f = {f}",
        2 * f + 1,
        "n > 2f",
        lambda rows: nearest_median(rows, len(rows) - f),
    )
    return robust(rule, Before(f, mixing, bucket_size, clip_norm), server_lr, client_momentum)
