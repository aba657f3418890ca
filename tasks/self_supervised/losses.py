"""What two views of the same examples should have in common: one loss an example.

``a`` and ``b`` are (B, d): row i of both is of example i.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def simclr(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    """NT-Xent, (B,): the mean over an example's two views; the other views are its negatives.

    Source: Chen et al. 2020, equation 1 and Algorithm 1 (arXiv:2002.05709).
    """
    n = len(a)
    z = F.normalize(torch.cat([a, b]), dim=1)
    logits = z @ z.T / temperature
    itself = torch.eye(2 * n, dtype=torch.bool, device=z.device)
    partner = torch.arange(2 * n, device=z.device).roll(n)
    each = F.cross_entropy(logits.masked_fill(itself, -torch.inf), partner, reduction="none")
    return (each[:n] + each[n:]) / 2


def with_queue(queries: Tensor, keys: Tensor, remembered: Tensor, temperature: float) -> Tensor:
    """InfoNCE, (B,), of unit vectors: the other keys and what is remembered are the negatives.

    Args:
        queries: (B, d).
        keys: (B, d), each the partner of its row; no gradient reaches them.
        remembered: (B, Q), cosines of the queries with the queue.
        temperature: of the softmax.

    Source: He et al. 2020, equation 1 (arXiv:1911.05722).
    """
    logits = torch.cat([queries @ keys.detach().T, remembered], 1) / temperature
    partner = torch.arange(len(queries), device=queries.device)
    return F.cross_entropy(logits, partner, reduction="none")


def cosine(predicted: Tensor, target: Tensor) -> Tensor:
    """``2 - 2 cos``, (B,), of normalised vectors; no gradient reaches ``target``.

    Source: Grill et al. 2020, equation 2 (arXiv:2006.07733); Chen and He 2021, equation 1
    (arXiv:2011.10566), up to scale and shift.
    """
    return 2 - 2 * F.cosine_similarity(predicted, target.detach(), dim=1)


def barlow_twins(a: Tensor, b: Tensor, redundancy: float) -> Tensor:
    """How far the views' cross-correlation is from the identity, the same (B,) times.

    Source: Zbontar et al. 2021, equations 1 and 2 and Algorithm 1 (arXiv:2103.03230), with the
    biased standard deviation and 1e-5 under its root.
    """
    c = standard(a).T @ standard(b) / len(a)
    on = torch.eye(c.shape[0], dtype=torch.bool, device=c.device)
    apart = c.square().masked_fill(on, 0).sum()
    return ((1 - c.diagonal()).square().sum() + redundancy * apart).expand(len(a))


def standard(z: Tensor) -> Tensor:
    """Each coordinate over the batch, (B, d), with mean 0 and variance 1."""
    return (z - z.mean(0)) / (z.var(0, unbiased=False) + 1e-5).sqrt()
