"""What embeddings are worth, told by labels that training never saw; figures (B,), exact."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def spread(h: Tensor) -> Tensor:
    """Near 1 where directions fill the space, 0 where all are one: the same (B,) times.

    Source: Chen and He 2021, section 4.1 (arXiv:2011.10566): the standard deviation of each
    coordinate of h/|h| over the batch, their mean, times the root of how many there are.
    """
    z = F.normalize(h.float(), dim=1)
    deviation: Tensor = z.std(0, unbiased=False).mean() * float(z.shape[1]) ** 0.5
    return deviation.expand(len(z))


def linear_probe(h: Tensor, y: Tensor, classes: int, ridge: float = 1e-2) -> Tensor:
    """Whether a linear classifier of the other examples of the batch is right about this one.

    The classifier is ridge regression on the classes' indicators over standardised embeddings;
    leaving each example out costs no second fit: ``e_i / (1 - H_ii)`` is its residual.

    Args:
        h: (B, d).
        y: (B,), 0 … classes-1.
        classes: how many.
        ridge: penalty, as a multiple of the number of examples.

    Source: Allen 1974, Technometrics 16 (PRESS).
    """
    wide = h.double()
    x = (wide - wide.mean(0)) / (wide.std(0, unbiased=False) + 1e-8)
    x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    penalty = ridge * len(x) * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    hat = x @ torch.linalg.solve(x.T @ x + penalty, x.T)
    target = F.one_hot(y, classes).to(x)
    residual = (target - hat @ target) / (1 - hat.diagonal())[:, None]
    right: Tensor = (target - residual).argmax(1) == y
    return right.float()


def nearest(h: Tensor, y: Tensor, classes: int, neighbours: int = 5) -> Tensor:
    """Whether the nearest others of the batch by cosine, most of them, are of the same class."""
    z = F.normalize(h.float(), dim=1)
    near = (z @ z.T).fill_diagonal_(-torch.inf)
    votes = y[near.topk(min(neighbours, max(len(y) - 1, 1)), dim=1).indices]
    return (F.one_hot(votes, classes).sum(1).argmax(1) == y).float()
