"""Barlow Twins."""

from __future__ import annotations

from torch import Tensor, nn

from umbel.core.settings import Count, NonNegative
from umbel.tasks.self_supervised import losses as of
from umbel.tasks.self_supervised.method import Method, View, two_views
from umbel.tasks.self_supervised.networks import Around
from umbel.tasks.task import Forward


def barlow_twins(
    embedding: int,
    *,
    redundancy: NonNegative = 0.005,
    projection: Count = 32,
    hidden: Count = 64,
) -> Method:
    """Barlow Twins: coordinates agree between views, and differ from each other over a batch.

    Args:
        embedding: numbers that the encoder gives.
        redundancy: weight of correlations of different coordinates.
        projection: coordinates.
        hidden: units of the projector.

    Source: Zbontar et al. 2021, Algorithm 1 (arXiv:2103.03230).
    """

    def around(encoder: nn.Module) -> nn.Module:
        return Around(encoder, embedding, projection, hidden)

    def losses(forward: Forward, x: Tensor, view: View) -> Tensor:
        a, b = two_views(forward, x, view)
        return of.barlow_twins(a[:, embedding:], b[:, embedding:], redundancy)

    return Method(around, losses, decomposable=False)
