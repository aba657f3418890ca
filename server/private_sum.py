"""How client-level privacy combines: the noised sum of clipped deltas over a fixed denominator.

It stands in the place of a strategy's weighted mean, so any strategy with one can be private, and
workers fold it as they fold the mean.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from umbel.core.errors import InputError
from umbel.core.payloads import Updates
from umbel.core.trees import Tree, map_tree
from umbel.privacy.clipping import Clip
from umbel.strategies.parts import Combined, Combiner, Strategy, weighted_mean


class Parts(NamedTuple):
    """How a client's update becomes a bounded contribution; it is sent to workers.

    Args:
        clip: of the parameters' delta; what is not finite contributes zero.
        buffers: names that are not released: their deltas count as zero.
        cap: the most that a client weighs: its contribution is clip(delta) * weight / cap.
    """

    clip: Clip
    buffers: frozenset[str]
    cap: float


class Terms(NamedTuple):
    """How one round is combined.

    Args:
        combine: in the place of the strategy's own.
        parts: for workers; ``None``: the strategy's own combiner.
    """

    combine: Combiner
    parts: Parts | None


class PrivateSums(NamedTuple):
    """A sum under way.

    Args:
        sums: of the weighted mean.
        short: how many deltas were at most as long as the clip norm. Private.
        came: how many came.
    """

    sums: object
    short: int
    came: int


def private_sum(
    parts: Parts, finish: Callable[[Tree, int, int], Combined] | None = None
) -> Combiner:
    """Sums contributions, each at most ``parts.clip.clip_norm`` long.

    A contribution is all that a client sends: its delta, and what its strategy uploads besides, as
    ONE vector. What the server makes of the noised sum of these vectors is post-processing.

    Guarantees: any one client, whatever it sends, moves the sum by at most the clip norm (adding or
    removing it), in float64 and to rounding.

    Args:
        parts: how an update becomes a contribution.
        finish: (sum of contributions, short, came) -> what the server step is given: noised.
            ``None`` in workers, which finish nothing.

    Source: McMahan et al. 2018, Algorithm 1, its fixed-denominator estimator (arXiv:1710.06963).
    """
    inner = weighted_mean()

    def zero(model: Tree) -> PrivateSums:
        return PrivateSums(inner.zero(model), 0, 0)

    def add(sums: PrivateSums, updates: Updates) -> PrivateSums:
        params = {n: t for n, t in updates.delta.items() if n not in parts.buffers}
        clipped = parts.clip(params, stacked=True)
        still = {n: torch.zeros_like(updates.delta[n]) for n in parts.buffers}
        weights = (updates.weights / parts.cap).clamp(max=1.0)
        bounded = Updates(updates.round, updates.clients, {**clipped.tree, **still}, weights)
        short = int((clipped.norms <= parts.clip.clip_norm).sum())
        came = len(updates.clients)
        return PrivateSums(inner.add(sums.sums, bounded), sums.short + short, sums.came + came)

    def merge(left: PrivateSums, right: PrivateSums) -> PrivateSums:
        assert inner.merge is not None
        sums = inner.merge(left.sums, right.sums)
        return PrivateSums(sums, left.short + right.short, left.came + right.came)

    def end(sums: PrivateSums) -> Combined:
        assert finish is not None
        total: Tree = sums.sums.delta  # type: ignore[attr-defined]
        return finish(total, sums.short, sums.came)

    return Combiner(zero, add, merge, end)


def check_mean(strategy: Strategy, name: str, model: Tree) -> None:
    """Refuses strategies whose combiner is more than a weighted mean of what clients send.

    Raises:
        InputError: the reason.
    """
    reason = ""
    sent = {**model, **strategy.upload_template(model)}
    if strategy.combine.merge is None:
        reason = "needs every update by itself, and a bounded influence on its result is not known"
    elif any("/" in n and not _alike(n, t, model) for n, t in sent.items()):
        reason = (
            "has clients send figures besides their deltas, which would share one clip norm and "
            "one noise with them, and on which the server's step hinges"
        )
    elif not _is_mean(strategy.combine, sent):
        reason = "sums something else than deltas, whose sensitivity is not known"
    if reason:
        raise InputError(
            f"strategy '{name}' {reason}",
            where="[privacy] unit",
            fix="use fedavg, fedprox, fedavgm, fedadam or another weighted mean",
        )


def _alike(path: str, upload: Tensor, model: Tree) -> bool:
    """Whether an upload stands for a parameter, as a control variate does."""
    like = model.get(path.rpartition("/")[2])
    return like is not None and (like.shape, like.dtype) == (upload.shape, upload.dtype)


def _is_mean(combiner: Combiner, model: Tree) -> bool:
    """Whether two updates of known values come to their weighted mean."""
    delta = map_tree(
        lambda t: torch.stack([torch.ones_like(t), torch.full_like(t, 2)]), _floats(model)
    )
    probe = Updates(1, ["a", "b"], delta, torch.tensor([1.0, 3.0], dtype=torch.float64))
    found = combiner.finish(combiner.add(combiner.zero(_floats(model)), probe)).delta
    return found.keys() == delta.keys() and all(
        torch.allclose(t.double(), torch.full_like(t, 1.75).double()) for t in found.values()
    )


def _floats(model: Tree) -> dict[str, torch.Tensor]:
    return {name: t for name, t in model.items() if t.dtype.is_floating_point}
