"""Groups of examples, each around its mean."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from umbel.core.errors import InputError
from umbel.core.run_file import Part
from umbel.core.settings import Count, NonNegative
from umbel.datasets.federated import Info
from umbel.tasks.generative.decode import require_numbers
from umbel.tasks.task import Batch, Forward, Task


class Centroids(nn.Module):
    """The means of the groups, (groups, numbers)."""

    def __init__(self, groups: int, numbers: int, centre: float, spread: float) -> None:
        super().__init__()
        self.centroids = nn.Parameter(centre + spread * torch.randn(groups, numbers))

    def forward(self, x: Tensor) -> Tensor:
        """(B, …) -> squared distances to the centroids, (B, groups)."""
        far = x.flatten(1)[:, None] - self.centroids[None]
        return far.square().sum(2)


def kmeans(
    info: Info,
    model: Part | str | None,
    *,
    groups: Count = 10,
    centre: float = 0.0,
    spread: NonNegative = 1.0,
) -> Task:
    """k-means: half the squared distance of an example to the nearest centroid.

    With ``[strategy] name = "kmeans"`` and ``[client] batch_size = "full"`` a round is one of
    Lloyd's on all examples; other strategies train centroids by gradients. ``inertia`` is the mean
    squared distance; where there are labels, ``purity`` is the share of examples with the commonest
    label of their group, of those in the same batch of 512.

    Args:
        info: of the data; ``x`` is numbers.
        model: none can be chosen.
        groups: how many.
        centre: mean of the first centroids' numbers, which are drawn without a look at the data.
        spread: their standard deviation.

    Source: Lloyd 1982 (IEEE Trans. Inf. Theory 28); Bottou and Bengio 1995, equation 1 (NIPS 7).
    """
    require_numbers(info, "kmeans")
    if model is not None:
        raise InputError(
            "kmeans has no other model than its centroids",
            where="[task] model",
            fix="remove it",
        )

    def build() -> nn.Module:
        return Centroids(groups, prod(info.input_shape), centre, spread)

    def losses(forward: Forward, batch: Batch) -> Tensor:
        return forward(batch["x"]).amin(1) / 2

    def metrics(forward: Forward, batch: Batch) -> Mapping[str, Tensor]:
        far = forward(batch["x"])
        found = {"inertia": far.amin(1)}
        if info.classes is not None:
            y = batch["y"]
            member = F.one_hot(far.argmin(1), groups).to(far)
            commonest = (member.T @ F.one_hot(y, info.classes).to(far)).argmax(1)
            found["purity"] = (commonest[far.argmin(1)] == y).to(far.dtype)
        return found

    test = Task(build, losses, metrics)
    return Task(build, losses, lambda forward, batch: {}, test=test)
