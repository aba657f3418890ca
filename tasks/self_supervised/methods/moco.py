"""MoCo."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from umbel.core.settings import Count, Fraction, Positive
from umbel.tasks.self_supervised.losses import with_queue
from umbel.tasks.self_supervised.method import Method, View, two_views
from umbel.tasks.self_supervised.networks import Slow, head
from umbel.tasks.task import Forward


def moco(
    embedding: int,
    *,
    temperature: Positive = 0.2,
    momentum: Fraction = 0.99,
    queue: Count = 512,
    projection: Count = 32,
    hidden: Count = 64,
) -> Method:
    """MoCo: SimCLR whose negatives are a slow copy's embeddings of earlier batches, too.

    The queue holds embeddings of a client's examples: it never leaves the client, and is empty when
    a round begins. So that the first step has negatives, those of the batch count as well.

    Args:
        embedding: numbers that the encoder gives.
        temperature: of the softmax.
        momentum: of the slow copy, which begins each round as the global network.
        queue: embeddings that are remembered.
        projection: numbers that are compared.
        hidden: units of the projector.

    Source: He et al. 2020, Algorithm 1 (arXiv:1911.05722), with both views as queries.
    """

    def around(encoder: nn.Module) -> nn.Module:
        return Queued(encoder, embedding, projection, hidden, momentum, queue)

    def losses(forward: Forward, x: Tensor, view: View) -> Tensor:
        a, b = two_views(forward, x, view)
        q = slice(embedding, embedding + projection)
        k = slice(embedding + projection, embedding + 2 * projection)
        old = slice(embedding + 2 * projection, None)
        first = with_queue(a[:, q], b[:, k], a[:, old], temperature)
        return (first + with_queue(b[:, q], a[:, k], b[:, old], temperature)) / 2

    return Method(around, losses, decomposable=False, follows=True)


class Queued(nn.Module):
    """An encoder, a projector, their slow copy, and a ring of what that gave lately."""

    queue: Tensor
    at: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        embedding: int,
        projection: int,
        hidden: int,
        momentum: float,
        length: int,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = head(embedding, hidden, projection)
        self.target = Slow(nn.Sequential(encoder, self.projector), momentum)
        self.register_buffer("queue", torch.zeros(length, projection), persistent=False)
        self.register_buffer("at", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, …) -> embedding, query, key, and the query's cosines with the queue, side by side.

        Where the queue is empty, that is minus infinity. A step of training fills it.
        """
        h = self.encoder(x)
        query = F.normalize(self.projector(h), dim=1)
        with torch.no_grad():
            keys = F.normalize(self.target.network()(x), dim=1)
        empty = torch.arange(len(self.queue), device=x.device) >= self.at
        # A copy, since the ring is written to before the backward pass.
        old = (query @ self.queue.to(query, copy=True).T).masked_fill(empty, -torch.inf)
        if self.training and torch.is_grad_enabled():
            length = len(self.queue)
            latest = keys[-length:]
            place = (self.at + torch.arange(len(latest), device=x.device)) % length
            self.queue[place] = latest.to(self.queue)
            self.at += len(latest)
        return torch.cat([h, query, keys, old], 1)
