"""SimCLR."""

from __future__ import annotations

from torch import Tensor, nn

from umbel.core.settings import Count, Positive
from umbel.tasks.self_supervised import losses as of
from umbel.tasks.self_supervised.method import Method, View, two_views
from umbel.tasks.self_supervised.networks import Around
from umbel.tasks.task import Forward


def simclr(
    embedding: int, *, temperature: Positive = 0.5, projection: Count = 32, hidden: Count = 64
) -> Method:
    """SimCLR: tell an example's other view from the views of all others (InfoNCE).

    Args:
        embedding: numbers that the encoder gives.
        temperature: of the softmax.
        projection: numbers that are compared.
        hidden: units of the projector.

    Source: Chen et al. 2020, Algorithm 1 (arXiv:2002.05709).
    """

    def around(encoder: nn.Module) -> nn.Module:
        return Around(encoder, embedding, projection, hidden)

    def losses(forward: Forward, x: Tensor, view: View) -> Tensor:
        a, b = two_views(forward, x, view)
        return of.simclr(a[:, embedding:], b[:, embedding:], temperature)

    return Method(around, losses, decomposable=False)
