"""The encoder and what is trained around it."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class Around(nn.Module):
    """An encoder, a projector, perhaps a predictor, perhaps slow copies of the first two.

    The slow copies are BYOL's target: buffers, so that they travel and are averaged as the weights
    are, and no gradient reaches them. Each forward pass in training first moves them to where the
    last step left the weights: ``target = momentum * target + (1 - momentum) * online``.

    Args:
        encoder: (B, …) -> (B, embedding).
        embedding: numbers that it gives.
        projection: numbers that the projector gives.
        hidden: units of projector and predictor.
        predicts: whether there is a predictor.
        momentum: of the slow copies; ``None``: there are none.

    Source: Grill et al. 2020, section 3.1 (arXiv:2006.07733); layer norm in place of batch norm,
    whose statistics clients of different classes do not share.
    """

    def __init__(
        self,
        encoder: nn.Module,
        embedding: int,
        projection: int,
        hidden: int,
        predicts: bool = False,
        momentum: float | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = _head(embedding, hidden, projection)
        self.predictor = _head(projection, hidden, projection) if predicts else None
        self.momentum = momentum
        if momentum is not None:
            self.target = _without_parameters(copy.deepcopy(nn.Sequential(encoder, self.projector)))

    def forward(self, x: Tensor) -> Tensor:
        """(B, …) -> embedding, projection, prediction and target of each, side by side."""
        if self.momentum is not None and self.training and torch.is_grad_enabled():
            self._follow(self.momentum)
        h = self.encoder(x)
        found = [h, z := self.projector(h)]
        if self.predictor is not None:
            found.append(self.predictor(z))
        if self.momentum is not None:
            with torch.no_grad():
                found.append(self.target(x))
        return torch.cat(found, 1)

    def _follow(self, momentum: float) -> None:
        online = {
            f"{place}.{name}": p.detach()
            for place, part in enumerate((self.encoder, self.projector))
            for name, p in [*part.named_parameters(), *part.named_buffers()]
        }
        for name, slow in self.target.named_buffers():
            if slow.is_floating_point():
                slow.mul_(momentum).add_(online[name], alpha=1 - momentum)


def _head(inputs: int, hidden: int, outputs: int) -> nn.Module:
    first, last = nn.Linear(inputs, hidden), nn.Linear(hidden, outputs)
    return nn.Sequential(first, nn.LayerNorm(hidden), nn.ReLU(), last)


def _without_parameters(module: nn.Module) -> nn.Module:
    """``module``, its parameters become buffers."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            delattr(part, name)
            part.register_buffer(name, parameter.detach().clone())
    return module
