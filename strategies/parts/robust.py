"""The common frame of robust rules: clip, mix, choose rows, combine columns.

Every step but the last replaces the rows by means of rows. So the steps are one small matrix, and
the updates themselves are read twice for distances and once for the result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from umbel.core.trees import Tree
from umbel.strategies.fedavg import fedavg
from umbel.strategies.parts.combine import Combiner
from umbel.strategies.parts.robust_mixing import ClipNorm, Mix, Mixing, clip_scale, premix
from umbel.strategies.parts.robust_momentum import client_momentum
from umbel.strategies.parts.robust_rows import Cohort, centred_gram, gather, gram
from umbel.strategies.parts.strategy import Strategy


class Rule(NamedTuple):
    """A robust rule.

    Args:
        name: of the strategy, with its parameters, for errors.
        fewest: rows without which it is not defined.
        needs: the same as its paper says it, such as ``n > 2f + 2``.
        columns: (m, c) float64 -> (c,): what becomes of each coordinate.
        mix: chooses or averages rows before; ``None`` leaves them.
    """

    name: str
    fewest: int
    needs: str
    columns: Callable[[Tensor], Tensor]
    mix: Mix | None = None


class Before(NamedTuple):
    """What is done to the deltas before a rule sees them: they are clipped, then mixed.

    Args:
        f: hostile clients in a cohort that it must stand.
        mixing: the pre-step.
        bucket_size: rows that bucketing averages.
        clip_norm: bound on the L2 norm of a delta.
    """

    f: int
    mixing: Mixing
    bucket_size: int
    clip_norm: ClipNorm


def robust(rule: Rule, before: Before, server_lr: float, momentum: float) -> Strategy:
    """FedAvg whose mean is a robust rule; every client counts for one, whatever it says it holds.

    Parameters and floating buffers are one vector; integers take their median.

    Args:
        rule: what combines.
        before: what is done to deltas before.
        server_lr: as in FedAvg.
        momentum: of the clients.
    """
    return fedavg(server_lr=server_lr)._replace(
        client=client_momentum(momentum), combine=robust_combiner(rule, before)
    )


def robust_combiner(rule: Rule, before: Before) -> Combiner:
    """What combines in :func:`robust`."""

    def finish(cohort: Cohort, model: Tree, names: Sequence[str]) -> dict[str, Tensor]:
        matrix = mixture(cohort, names, before, rule.mix)
        if matrix is None:
            return cohort.columns(model, names, rule.columns)
        return cohort.columns(model, names, lambda rows: rule.columns(product(matrix, rows)))

    return gather(finish, *bound(rule, before))


def bound(rule: Rule, before: Before) -> tuple[int, str, str]:
    """(updates that ``rule`` needs after ``before``, the rule's name, what its paper says)."""
    fewest, needs = max(rule.fewest, 1), rule.needs
    if before.mixing == "nnm":
        fewest = max(fewest, 2 * before.f + 1)
    elif before.mixing == "bucketing":
        fewest = (fewest - 1) * before.bucket_size + 1
        needs += f", counted in buckets of {before.bucket_size}"
    return fewest, rule.name, needs


def mixture(
    cohort: Cohort, names: Sequence[str], before: Before, mix: Mix | None = None
) -> Tensor | None:
    """(m, n) float64: the rows that all steps together make of the cohort's; ``None``: the same."""
    steps = premix(before.mixing, before.f, before.bucket_size, cohort.parts[0].round)
    steps += [] if mix is None else [mix]
    if not steps and before.clip_norm is None:
        return None
    scale = clip_scale(gram(cohort, names).diagonal().sqrt(), before.clip_norm, before.f)
    matrix = torch.eye(len(scale), dtype=torch.float64)
    around = centred_gram(cohort, names, scale) if steps else matrix
    for step in steps:
        chosen = step(around)
        around = chosen @ around @ chosen.T
        matrix = chosen @ matrix
    return matrix * scale


def product(matrix: Tensor, rows: Tensor) -> Tensor:
    """``matrix @ rows`` without the rows that have no part: 0 times what overflows is NaN."""
    used = (matrix != 0).any(0)
    return matrix[:, used] @ rows[used]
