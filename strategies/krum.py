"""Krum."""

from __future__ import annotations

from umbel.core.settings import Count, Fraction, Natural, Positive
from umbel.strategies.parts import Strategy
from umbel.strategies.parts.robust import Before, Rule, robust
from umbel.strategies.parts.robust_choice import lowest_scores
from umbel.strategies.parts.robust_mixing import ClipNorm, Mixing
from umbel.strategies.parts.robust_rows import mean


def krum(
    *,
    f: Natural,
    mixing: Mixing = "none",
    bucket_size: Count = 2,
    clip_norm: ClipNorm = None,
    client_momentum: Fraction = 0.0,
    server_lr: Positive = 1.0,
) -> Strategy:
    """Krum: the delta nearest its n - f - 2 neighbours. Blanchard et al. 2017 (arXiv:1703.02757).

    Section 4. One client's delta is the step of all: slow, and for strong attacks only.

    Args:
        f: hostile clients in a cohort that it must stand.
        mixing: pre-step that averages each delta with its n - f - 1 nearest, or random buckets.
        bucket_size: ``bucketing``: deltas a bucket.
        clip_norm: bound on the L2 norm of each delta, before all else; ``adaptive``: a quantile.
        client_momentum: of the deltas, kept at each client (Karimireddy et al. 2021).
        server_lr: factor on the result, as in FedAvg.
    """
    rule = Rule(
        f"krum with f = {f}",
        2 * f + 3,
        "n > 2f + 2",
        mean,
        lambda around: lowest_scores(around, f, 1),
    )
    return robust(rule, Before(f, mixing, bucket_size, clip_norm), server_lr, client_momentum)
