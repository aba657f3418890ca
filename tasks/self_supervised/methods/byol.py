"""BYOL."""

from __future__ import annotations

from torch import Tensor, nn

from umbel.core.settings import Count, Fraction
from umbel.tasks.self_supervised.losses import cosine
from umbel.tasks.self_supervised.method import Method, View, two_views
from umbel.tasks.self_supervised.networks import Around, Norm
from umbel.tasks.task import Forward


def byol(
    embedding: int,
    *,
    momentum: Fraction = 0.99,
    projection: Count = 32,
    hidden: Count = 64,
    norm: Norm = "batch",
) -> Method:
    """BYOL: predict what a slow copy makes of an example's other view; no negatives.

    Args:
        embedding: numbers that the encoder gives.
        momentum: of the slow copy, which begins each round as the global network.
        projection: numbers that are compared.
        hidden: units of projector and predictor.

        norm: of projector and predictor. ``batch`` is the paper's; ``layer`` sees one example
            alone, as example-level privacy needs it, and may collapse.

    Source: Grill et al. 2020, equation 2 (arXiv:2006.07733).
    """

    def around(encoder: nn.Module) -> nn.Module:
        return Around(encoder, embedding, projection, hidden, True, momentum, norm)

    def losses(forward: Forward, x: Tensor, view: View) -> Tensor:
        a, b = two_views(forward, x, view)
        guess = slice(embedding + projection, embedding + 2 * projection)
        target = slice(embedding + 2 * projection, None)
        return (cosine(a[:, guess], b[:, target]) + cosine(b[:, guess], a[:, target])) / 2

    return Method(around, losses, decomposable=norm == "layer", follows=True)
