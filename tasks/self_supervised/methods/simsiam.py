"""SimSiam."""

from __future__ import annotations

from torch import Tensor, nn

from umbel.core.settings import Count
from umbel.tasks.self_supervised.losses import cosine
from umbel.tasks.self_supervised.method import Method, View, two_views
from umbel.tasks.self_supervised.networks import Around, Norm
from umbel.tasks.task import Forward


def simsiam(
    embedding: int, *, projection: Count = 32, hidden: Count = 64, norm: Norm = "batch"
) -> Method:
    """SimSiam: predict the projection of an example's other view, which gets no gradient.

    Args:
        embedding: numbers that the encoder gives.
        projection: numbers that are compared.
        hidden: units of projector and predictor.

        norm: of projector and predictor. ``batch`` is the paper's; ``layer`` sees one example
            alone, as example-level privacy needs it, and may collapse.

    Source: Chen and He 2021, Algorithm 1 (arXiv:2011.10566).
    """

    def around(encoder: nn.Module) -> nn.Module:
        return Around(encoder, embedding, projection, hidden, predicts=True, norm=norm)

    def losses(forward: Forward, x: Tensor, view: View) -> Tensor:
        a, b = two_views(forward, x, view)
        target = slice(embedding, embedding + projection)
        guess = slice(embedding + projection, None)
        return (cosine(a[:, guess], b[:, target]) + cosine(b[:, guess], a[:, target])) / 2

    return Method(around, losses, decomposable=norm == "layer")
