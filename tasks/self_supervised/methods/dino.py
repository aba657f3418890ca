"""DINO."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from umbel.core.settings import Count, Fraction, Positive
from umbel.tasks.self_supervised.method import Method, View, two_views
from umbel.tasks.self_supervised.networks import Slow, head
from umbel.tasks.task import Forward


def dino(
    embedding: int,
    *,
    prototypes: Count = 256,
    temperature: Positive = 0.1,
    sharpness: Positive = 0.04,
    momentum: Fraction = 0.99,
    centre: Fraction = 0.9,
    projection: Count = 32,
    hidden: Count = 64,
) -> Method:
    """DINO: give an example's other view the prototypes that a slow copy gives it.

    The centre, what the copy gives on average, is of the client's own examples: it never leaves the
    client, and begins each round as the mean of the first batch.

    Args:
        embedding: numbers that the encoder gives.
        prototypes: outputs that are compared as a distribution.
        temperature: of the network's distribution.
        sharpness: temperature of the copy's; lower is sharper.
        momentum: of the slow copy, which begins each round as the global network.
        centre: momentum of the centre.
        projection: numbers between projector and prototypes.
        hidden: units of the projector.

    Source: Caron et al. 2021, Algorithm 1 (arXiv:2104.14294), with two views and no small crops.
    """

    def around(encoder: nn.Module) -> nn.Module:
        return Centred(encoder, embedding, projection, hidden, prototypes, momentum, centre)

    def losses(forward: Forward, x: Tensor, view: View) -> Tensor:
        a, b = (v[:, embedding:].chunk(2, 1) for v in two_views(forward, x, view))

        def one(student: Tensor, teacher: Tensor) -> Tensor:
            target = (teacher.detach() / sharpness).softmax(1)
            return -(target * (student / temperature).log_softmax(1)).sum(1)

        return (one(a[0], b[1]) + one(b[0], a[1])) / 2

    return Method(around, losses, decomposable=False, follows=True)


class _Prototypes(nn.Module):
    """The cosines with learned directions, (B, d) -> (B, prototypes)."""

    def __init__(self, inputs: int, count: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(count, inputs))

    def forward(self, z: Tensor) -> Tensor:
        return F.normalize(z, dim=1) @ F.normalize(self.weight, dim=1).T


class Centred(nn.Module):
    """An encoder, a projector with prototypes, their slow copy, and the centre of what it gives."""

    centre: Tensor
    begun: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        embedding: int,
        projection: int,
        hidden: int,
        prototypes: int,
        momentum: float,
        slowly: float,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        last = _Prototypes(projection, prototypes)
        self.projector = nn.Sequential(head(embedding, hidden, projection), last)
        self.target = Slow(nn.Sequential(encoder, self.projector), momentum)
        self.slowly = slowly
        self.register_buffer("centre", torch.zeros(prototypes), persistent=False)
        self.register_buffer("begun", torch.zeros((), dtype=torch.bool), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, …) -> embedding, the network's logits, and the copy's, centred, side by side."""
        h = self.encoder(x)
        with torch.no_grad():
            given = self.target.network()(x)
            mean = given.mean(0)
            centre = torch.where(self.begun & self.training, self.centre, mean)
            if self.training and torch.is_grad_enabled():
                self.centre.copy_(centre.lerp(mean, 1 - self.slowly))
                self.begun.fill_(True)
        return torch.cat([h, self.projector(h), given - centre], 1)
