"""A pre-trained encoder with a new last layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from umbel.core.run_file import Part
from umbel.core.settings import Count
from umbel.datasets.federated import Info
from umbel.tasks.models.build import builder


class Probe(nn.Module):
    """(B, …) -> embedding -> (B, outputs), linearly."""

    def __init__(self, inside: nn.Module, embedding: int, outputs: int) -> None:
        super().__init__()
        self.encoder = inside
        self.head = nn.Linear(embedding, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(B, …) -> (B, outputs)."""
        out: Tensor = self.head(self.encoder(x))
        return out


def encoder(
    info: Info,
    outputs: int,
    *,
    of: str | dict[str, Any],
    embedding: Count = 64,
    frozen: bool = False,
) -> nn.Module:
    """What a ``self-supervised`` run trained, by ``[task] init_from``, and a new linear layer.

    Args:
        info: of the data.
        outputs: width of the new layer.
        of: the encoder, as ``[task] model`` of that run.
        embedding: as that run's.
        frozen: whether the new layer alone is trained, and travels.
    """
    part = of if isinstance(of, str) else Part(**of)
    inside = builder(part, info, embedding, head="features")()
    return Probe(inside.requires_grad_(not frozen), embedding, outputs)
