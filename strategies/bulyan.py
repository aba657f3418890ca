"""Bulyan."""

from __future__ import annotations

from umbel.core.settings import Count, Fraction, Natural, Positive
from umbel.strategies.parts import Strategy
from umbel.strategies.parts.robust import Before, Rule, robust
from umbel.strategies.parts.robust_choice import repeated_krum
from umbel.strategies.parts.robust_mixing import ClipNorm, Mixing
from umbel.strategies.parts.robust_rows import nearest_median


def bulyan(
    *,
    f: Natural,
    mixing: Mixing = "none",
    bucket_size: Count = 2,
    clip_norm: ClipNorm = None,
    client_momentum: Fraction = 0.0,
    server_lr: Positive = 1.0,
) -> Strategy:
    """Bulyan over Krum. El Mhamdi, Guerraoui and Rouault 2018, section 4 (arXiv:1802.07927).

    Krum picks n - 2f deltas, one after another; of each coordinate the n - 4f values nearest the
    median are averaged.

    Args:
        f: hostile clients in a cohort that it must stand.
        mixing: pre-step that averages each delta with its n - f - 1 nearest, or random buckets.
        bucket_size: ``bucketing``: deltas a bucket.
        clip_norm: bound on the L2 norm of each delta, before all else; ``adaptive``: a quantile.
        client_momentum: of the deltas, kept at each client (Karimireddy et al. 2021).
        server_lr: factor on the result, as in FedAvg.
    """
    rule = Rule(
        f"bulyan with f = {f}",
        4 * f + 3,
        "n >= 4f + 3",
        lambda rows: nearest_median(rows, len(rows) - 2 * f),
        lambda around: repeated_krum(around, f),
    )
    return robust(rule, Before(f, mixing, bucket_size, clip_norm), server_lr, client_momentum)
