"""Geometric median."""

from __future__ import annotations

from umbel.core.settings import Count, Fraction, Natural, Positive
from umbel.strategies.parts import Strategy
from umbel.strategies.parts.robust import Before, Rule, robust
from umbel.strategies.parts.robust_choice import weiszfeld
from umbel.strategies.parts.robust_mixing import ClipNorm, Mixing
from umbel.strategies.parts.robust_rows import mean


def geometric_median(
    *,
    f: Natural = 0,
    nu: Positive = 1e-6,
    iterations: Count = 100,
    mixing: Mixing = "none",
    bucket_size: Count = 2,
    clip_norm: ClipNorm = None,
    client_momentum: Fraction = 0.0,
    server_lr: Positive = 1.0,
) -> Strategy:
    """Geometric median (RFA) by smoothed Weiszfeld. Pillutla et al. 2022, Algorithm 2.

    arXiv:1912.13445. It minimises the sum of distances to the deltas.

    Args:
        f: hostile clients in a cohort that pre-steps and clipping shall stand; the median itself
            stands any number below half.
        nu: distances below it count as it, in parameter units.
        iterations: at most; it stops where weights no longer change.
        mixing: pre-step that averages each delta with its n - f - 1 nearest, or random buckets.
        bucket_size: ``bucketing``: deltas a bucket.
        clip_norm: bound on the L2 norm of each delta, before all else; ``adaptive``: a quantile.
        client_momentum: of the deltas, kept at each client (Karimireddy et al. 2021).
        server_lr: factor on the result, as in FedAvg.
    """
    rule = Rule(
        f"geometric-median with f = {f}",
        2 * f + 1,
        "n > 2f",
        mean,
        lambda around: weiszfeld(around, nu, iterations),
    )
    return robust(rule, Before(f, mixing, bucket_size, clip_norm), server_lr, client_momentum)
