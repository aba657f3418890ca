"""Centred clipping: deltas are clipped around the last step, not around zero."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from umbel.core.settings import Count, Fraction, Natural, Positive
from umbel.core.trees import Tree, add_cast, map_tree
from umbel.strategies.parts import Combined, ServerState, Strategy
from umbel.strategies.parts.robust import Before, Rule, bound, mixture, product
from umbel.strategies.parts.robust_mixing import ClipNorm, Mixing
from umbel.strategies.parts.robust_momentum import client_momentum as momentum_rule
from umbel.strategies.parts.robust_rows import Cohort, gather, median

ROWS = "rows"


def centred_clipping(
    *,
    tau: Positive,
    iterations: Count = 1,
    f: Natural = 0,
    mixing: Mixing = "none",
    bucket_size: Count = 2,
    clip_norm: ClipNorm = None,
    client_momentum: Fraction = 0.0,
    server_lr: Positive = 1.0,
) -> Strategy:
    """Centred clipping around the last step. Karimireddy et al. 2021 (arXiv:2012.10333).

    ``v = v + mean_k (delta_k - v) min(1, tau / |delta_k - v|)``, section 4; the server keeps v.

    Args:
        tau: radius, in units of the delta.
        iterations: of that line, each round.
        f: hostile clients in a cohort that the pre-step must stand.
        mixing: pre-step that averages each delta with its n - f - 1 nearest, or random buckets.
        bucket_size: ``bucketing``: deltas a bucket.
        clip_norm: bound on the L2 norm of each delta, before all else; ``adaptive``: a quantile.
        client_momentum: of the deltas, kept at each client (Karimireddy et al. 2021).
        server_lr: factor on v.
    """
    before = Before(f, mixing, bucket_size, clip_norm)

    def rows(cohort: Cohort, model: Tree, names: Sequence[str]) -> dict[str, Tensor]:
        # The server step needs every row. What is no parameter has no v: buffers take the median.
        matrix = mixture(cohort, names, before)
        found = cohort.columns(model, names, median)
        n = len(cohort.clients()) if matrix is None else len(matrix)
        kept = {name: torch.empty(n, model[name].numel(), dtype=torch.float64) for name in names}
        for name, where, chunk in cohort.chunks(names):
            kept[name][:, where] = chunk if matrix is None else product(matrix, chunk)
        return found | {f"{ROWS}/{n}": k.view(-1, *model[n].shape) for n, k in kept.items()}

    def init(params: Tree) -> ServerState:
        return {"v": map_tree(lambda p: torch.zeros_like(p, dtype=torch.float64), params)}

    def server(params: Tree, state: ServerState, combined: Combined) -> tuple[Tree, ServerState]:
        v, stacks = state["v"], {name: combined.extra[ROWS][name] for name in params}
        for _ in range(iterations):
            v = recentred(v, stacks, tau)
        return map_tree(lambda p, step: add_cast(p, server_lr * step), params, v), {"v": v}

    rule = Rule(f"centred-clipping with f = {f}", 2 * f + 1, "n > 2f", median)
    combiner = gather(rows, *bound(rule, before))
    return Strategy(init, momentum_rule(client_momentum), combiner, server)


def recentred(v: Tree, stacks: Tree, tau: float) -> dict[str, Tensor]:
    """One iteration: name -> (*shape), from the centre ``v`` and the rows, name -> (n, *shape)."""
    apart = map_tree(lambda stack, centre: stack - centre, stacks, v)
    squares = [rows.reshape(len(rows), -1).square().sum(1) for rows in apart.values()]
    scale = (tau / torch.stack(squares).sum(0).sqrt()).clamp(max=1.0)
    return map_tree(lambda c, rows: c + torch.tensordot(scale, rows, 1) / len(scale), v, apart)
