"""What is trained around an encoder, and copies that follow it slowly."""

from __future__ import annotations

import copy
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from umbel.tasks.self_supervised.losses import standard

Norm: TypeAlias = Literal["layer", "batch"]
"""Of projector and predictor: of one example alone, or of the batch, with no running statistics,
which clients of different classes would not share."""


class Slow(nn.Module):
    """A copy of a network that follows it: ``slow = momentum * slow + (1 - momentum) * online``.

    Its tensors are buffers that neither travel nor stay from round to round: each client begins a
    round with a copy of the global network. So it is a function of parameters alone, whatever was
    trained on, costs nothing on the wire, and no mean is taken of clients' copies. Where a model is
    evaluated, the copy is the network itself.

    Args:
        online: the network; not a part of this module.
        momentum: how slowly.

    Source: Grill et al. 2020, section 3.1 (arXiv:2006.07733).
    """

    def __init__(self, online: nn.Module, momentum: float) -> None:
        super().__init__()
        self._online = (online,)  # in a tuple, torch does not take it for a part
        self.momentum = momentum
        self.copy = _without_parameters(copy.deepcopy(online))

    def network(self) -> nn.Module:
        """What gives the targets; to be used without gradients."""
        return self.copy if self.training else self._online[0]

    def follow(self, step: int) -> None:
        """Follows the network, before a client's local step ``step`` = 0, 1, …"""
        share = 1 - self.momentum if step else 1.0
        with torch.no_grad():
            followed = self._online[0]
            online = dict([*followed.named_parameters(), *followed.named_buffers()])
            for name, slow in self.copy.named_buffers():
                if slow.is_floating_point():
                    slow.lerp_(online[name], share)


def follow(module: nn.Module, step: int) -> None:
    """Moves every slow copy in ``module``."""
    for part in module.modules():
        if isinstance(part, Slow):
            part.follow(step)


class Around(nn.Module):
    """An encoder, a projector, perhaps a predictor, perhaps a slow copy of the first two.

    Args:
        encoder: (B, …) -> (B, embedding).
        embedding: numbers that it gives.
        projection: numbers that the projector gives.
        hidden: units of projector and predictor.
        predicts: whether there is a predictor.
        momentum: of the slow copy; ``None``: there is none.
        norm: of projector and predictor.

    Source: Grill et al. 2020, section 3.1 (arXiv:2006.07733).
    """

    def __init__(
        self,
        encoder: nn.Module,
        embedding: int,
        projection: int,
        hidden: int,
        predicts: bool = False,
        momentum: float | None = None,
        norm: Norm = "layer",
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = head(embedding, hidden, projection, norm)
        self.predictor = head(projection, hidden, projection, norm) if predicts else None
        both = nn.Sequential(encoder, self.projector)
        self.target = None if momentum is None else Slow(both, momentum)

    def forward(self, x: Tensor) -> Tensor:
        """(B, …) -> embedding, projection, prediction and target of each, side by side."""
        h = self.encoder(x)
        found = [h, z := self.projector(h)]
        if self.predictor is not None:
            found.append(self.predictor(z))
        if self.target is not None:
            with torch.no_grad():
                found.append(self.target.network()(x))
        return torch.cat(found, 1)


def head(inputs: int, hidden: int, outputs: int, norm: Norm = "layer") -> nn.Module:
    """Two layers, a norm between them."""
    first, last = nn.Linear(inputs, hidden), nn.Linear(hidden, outputs)
    between = BatchNorm() if norm == "batch" else nn.LayerNorm(hidden)
    return nn.Sequential(first, between, nn.ReLU(), last)


class BatchNorm(nn.Module):
    """Batch norm without learned scales and running statistics; of one example, zeros."""

    def forward(self, z: Tensor) -> Tensor:
        """(B, units) -> the same shape."""
        return standard(z)


def _without_parameters(module: nn.Module) -> nn.Module:
    """``module``, all its tensors as buffers that are not part of its state."""
    for part in module.modules():
        held = [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]
        for name, tensor in held:
            delattr(part, name)
            part.register_buffer(name, tensor.detach().clone(), persistent=False)
    return module
